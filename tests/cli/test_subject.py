"""What a command is about, and that a saved run says it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from steer.cli import app
from steer.cli.subject import Subject


def test_files_say_what_was_given_whatever_is_in_it():
    """Commas and pluses of arguments and rewards are their own."""
    given = Subject(
        "./model", ("matches:a + b", "0.5*ink"), "a fox, red", ("sizes=[1, 2]", "seed_words=a, b"), 4, 3, "bf16"
    )
    assert Subject.saved(json.loads(json.dumps(given.facts())), steps=4) == given
    plain = Subject("digits", ("ink",), None, (), 4, None, "fp32")
    assert plain.facts()["reward"] == "ink"
    assert Subject.saved(plain.facts(), steps=4) == plain


def test_one_prompt_at_a_time():
    with pytest.raises(typer.BadParameter, match="one prompt at a time"):
        Subject.given("./model", ["ink"], ["a", "b"], None, None, None, "fp32")


def test_a_page_of_two_rewards_is_written_again(tmp_path):
    words = ["--model", "digits", "--reward", "ink", "--reward", "2*symmetry", "--steps", "2", "--particles", "2"]
    done = CliRunner().invoke(app.app, ["generate", *words, "--reference", "0", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (tmp_path / "report.html").unlink()
    done = CliRunner().invoke(app.app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "ink + 2*symmetry on digits" in page
    assert "</span>ink, 2*symmetry</li>" in page
