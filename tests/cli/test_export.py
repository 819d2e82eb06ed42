"""`steer export` writes what the functions of `steer.generation.exports` write."""

import json

import pytest
from typer.testing import CliRunner

import steer
from steer.cli import app
from steer.generation.run_directory import RunDirectory


def run(*words, code=0):
    done = CliRunner().invoke(app.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two rows, one of which is finished."""
    maker = steer.Generator("digits", reward="ink", method="best_of_n", particles=2, steps=2)
    rows = maker.rows([{"label": 3, "tag": "three"}, {"label": 8, "tag": "eight"}])
    directory = RunDirectory.open(tmp_path_factory.mktemp("runs") / "run", {}, rows)
    assert maker.make(directory, rows[0]) is None
    return directory.path


def test_an_export_says_what_it_wrote_and_what_is_not_finished(directory, tmp_path):
    said = run("export", directory, "--as", "webdataset", "--out", tmp_path / "shards").output
    assert "1 rows written" in said
    assert "1 are not finished" in said
    found = json.loads(run("export", directory, "--as", "parquet", "--out", tmp_path / "table", "--json").stdout)
    assert found["files"] == ["metadata.parquet"]
    assert (found["finished"], found["missing"]) == (1, 1)
    assert (tmp_path / "table" / "metadata.parquet").exists()


def test_what_cannot_be_exported_is_one_line(directory, tmp_path):
    again = run("export", directory, "--as", "webdataset", "--out", directory, code=1)
    assert "new or an empty directory" in " ".join(again.output.split())
    nowhere = run("export", tmp_path, "--as", "webdataset", "--out", tmp_path / "out", code=1)
    assert "needs run.yaml" in " ".join(nowhere.output.split())
    assert "parquet" in run("export", directory, "--as", "zip", "--out", tmp_path / "out", code=2).output
