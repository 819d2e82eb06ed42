"""Many prompts and real model folders from the command line."""

import json

import pytest
import tiny_pipelines
import torch
import yaml
from typer.testing import CliRunner

import steer
from steer.cli import app

SVDD = ["--reward", "jpeg", "--method", "svdd", "--steps", "2", "--particles", "2", "--set", "candidates=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "sd15"
    tiny_pipelines.sd15().save_pretrained(path)
    return str(path)


def run(*words, code=0):
    done = CliRunner().invoke(app.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


@pytest.mark.slow
def test_a_folder_and_a_prompt_write_what_a_run_in_python_gives(folder, tmp_path):
    words = ["generate", "--model", folder, "--prompt", "a fox", "--call", "guidance_scale=2", *SVDD]
    run(*words, "--reference", 0, "--out", tmp_path)
    saved = steer.load_run(tmp_path)
    process = steer.from_hub(folder, prompt="a fox", guidance_scale=2, steps=2)
    from steer import rewards, search

    expected = search.svdd(process, rewards.JPEGSize(), particles=2, candidates=2, key=0)
    assert torch.equal(saved.tensors["x"], expected.x)
    run("report", tmp_path)
    run("preflight", "--model", folder, "--prompt", "a fox", "--reward", "jpeg", "--steps", 2, "--json")


@pytest.mark.slow
def test_a_file_of_prompts_makes_a_run_directory_that_resumes(folder, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    entries = [{"prompt": f"a {what}", "guidance_scale": 2.0, "tag": what} for what in ("fox", "car", "tree")]
    prompts.write_text("\n".join(map(json.dumps, entries)))
    words = ["generate", "--model", folder, "--prompts", prompts, *SVDD, "--out", out]
    assert "0 finished, 0 failed, 3 missing" in run(*words, "--dry-run", code=1).output
    found = json.loads(run(*words, "--json").stdout)
    assert (found["finished"], found["failed"], found["missing"]) == (3, 0, 0)
    before = {path: path.read_bytes() for path in out.glob("images/**/*.png")}
    (out / "rows/000/000001/result.json").unlink()
    run("resume", out, "--quiet")
    assert {path: path.read_bytes() for path in out.glob("images/**/*.png")} == before
    assert "3 finished" in run("status", out).output
    assert yaml.safe_load((out / "run.yaml").read_text())["options"]["method"] == "svdd"
    again = run(*words[:-1], tmp_path / "again", "--config", out / "run.yaml", "--quiet")
    assert not again.stdout
    other = run(*words, "--temperature", 0.5, code=2)
    assert "temperature=1.0" in other.output


def test_labels_of_an_embedded_model_are_call_arguments(tmp_path):
    prompts = tmp_path / "labels.csv"
    prompts.write_text("label,tag\n3,three\n8,eight\n")
    words = ["--reward", "ink", "--steps", "3", "--particles", "2", "--n", "2"]
    run("generate", "--model", "digits", "--prompts", prompts, *words, "--out", tmp_path / "run")
    lines = (tmp_path / "run/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["tag"] for line in lines] == ["three", "three", "eight", "eight"]


def test_options_of_many_rows_are_those_of_python(tmp_path):
    prompts = tmp_path / "labels.csv"
    prompts.write_text("label\n3\n8\n")
    words = ["--model", "digits", "--prompts", prompts, "--reward", "ink", "--method", "smc", "--call"]
    words += ["guidance_scale=2", "--temperature", 0.05, "--seed", 3, "--steps", 3, "--particles", 4, "--n", 2]
    run("generate", *words, "--set", "keep_states=true", "--out", tmp_path / "run")
    maker = steer.Generator(
        "digits", reward="ink", temperature=0.05, seed=3, steps=3, particles=4, call={"guidance_scale": 2}
    )
    saved, expected = steer.load_run(tmp_path / "run/rows/000/000001"), maker.one(1, label=8)
    assert torch.equal(saved.tensors["x"], expected.x)
    assert torch.equal(saved.tensors["log_weight"], expected.log_weight)
    assert len(list((tmp_path / "run").glob("images/**/*.png"))) == 4


def test_which_rows_are_made(tmp_path):
    prompts, out = tmp_path / "labels.csv", tmp_path / "run"
    prompts.write_text("label\n3\n8\n")
    words = ["--reward", "ink", "--steps", 2, "--particles", 2, "--shard", "1/2"]
    run("generate", "--model", "digits", "--prompts", prompts, *words, "--out", out, code=1)
    assert [path.parent.name for path in sorted(out.glob("rows/*/*/result.json"))] == ["000001"]
    assert "1 finished, 0 failed, 1 missing" in run("resume", out, "--only-failed", code=1).output
    picture = out / "images/000/000001-00.png"
    picture.unlink()
    run("resume", out)
    assert not picture.exists()
    run("resume", out, "--force")
    assert picture.exists()


def test_each_of_several_processes_forgets_its_own_rows(tmp_path, monkeypatch):
    """One that starts late would undo what the others have made by then."""
    prompts, out = tmp_path / "labels.csv", tmp_path / "run"
    prompts.write_text("label\n3\n8\n")
    words = ["--reward", "ink", "--steps", 2, "--particles", 2]
    run("generate", "--model", "digits", "--prompts", prompts, *words, "--out", out)
    results = [out / f"rows/000/00000{index}/result.json" for index in range(2)]
    before = [path.stat().st_mtime_ns for path in results]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run("resume", out, "--force")
    after = [path.stat().st_mtime_ns for path in results]
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_a_row_has_a_page_and_a_run_of_many_says_how_to_get_one(tmp_path):
    prompts, out = tmp_path / "labels.csv", tmp_path / "run"
    prompts.write_text("label\n3\n8\n")
    words = ["--reward", "ink", "--steps", 2, "--particles", 2, "--call", "guidance_scale=2", "--temperature", 0.5]
    run("generate", "--model", "digits", "--prompts", prompts, *words, "--out", out)
    run("report", out / "rows/000/000001", "--out", tmp_path)
    page = (tmp_path / "report.html").read_text()
    for said in ("ink on digits", "guidance_scale=2, label=8", "temperature</span>0.5", "row</span>1"):
        assert said in page
    assert "a page is of one" in run("report", out, code=2).output


def test_failed_rows_are_told_and_made_again(tmp_path, monkeypatch):
    source = tmp_path / "own_rewards.py"
    source.write_text(
        "import os\n\n"
        "def eights(samples):\n"
        "    if os.environ.get('BROKEN'):\n"
        "        raise RuntimeError('no scores today')\n"
        "    return samples.flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = tmp_path / "labels.jsonl"
    prompts.write_text('{"label": 3}\n{"label": 8}\n')
    wrong = run(
        "generate", "--model", "digits", "--prompts", prompts, "--reward", "ink2", "--out", tmp_path / "x", code=2
    )
    assert "did you mean ink" in wrong.output
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("BROKEN", "yes")
    words = ["--reward", "own_rewards:eights", "--steps", "2", "--particles", "2", "--out", tmp_path / "run"]
    failed = run("generate", "--model", "digits", "--prompts", prompts, *words, code=1)
    assert "no scores today" in failed.output
    assert "steer resume" in failed.output
    assert "no scores today" in run("status", tmp_path / "run").output
    monkeypatch.delenv("BROKEN")
    assert "2 finished" in run("resume", tmp_path / "run", "--only-failed").output


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["--model", "owner/nowhere", "--prompt", "a"], "--download"),
        (["--model", "nowhere", "--prompt", "a"], "no embedded model of that name"),
        (["--model", "digits", "--prompt", "a"], "takes no prompt"),
        (["--model", "digits", "--call", "guidance_scale"], "NAME=VALUE"),
        (["--model", "digits", "--prompts", "missing.txt"], "cannot read"),
        (["--model", "letters", "--label", "3"], "takes no label"),
        (["--model", "digits", "--device", "cuda:77"], "--device cpu"),
    ],
)
def test_wrong_usage_says_what_is_right(words, cure, tmp_path):
    done = run("generate", *words, "--reward", "ink", "--out", tmp_path, code=2)
    assert cure in " ".join(done.output.replace("│", " ").split())


def test_a_config_file_sets_options_and_flags_win(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: digits\nreward: [ink]\nsteps: 3\nparticles: 2\nreference: 0\nset: [keep_states=true]\n")
    run("generate", "--config", config, "--steps", 2, "--out", tmp_path / "run")
    facts = json.loads((tmp_path / "run/result.json").read_text())
    assert facts["process"]["steps"] == 2
    assert len(facts["candidates"]) == 2
    config.write_text("model: digits\nrewards: [ink]\n")
    assert "rewards is no option" in run("generate", "--config", config, "--out", tmp_path / "run", code=2).output


def test_the_time_between_snapshots_makes_no_other_run(tmp_path, monkeypatch):
    from steer.generation.generator import Generator

    made, prompts, out = [], tmp_path / "prompts.jsonl", tmp_path / "run"
    monkeypatch.setattr(Generator, "run", lambda self, *args, **options: made.append(self.checkpoint) or iter(()))
    prompts.write_text("\n".join(json.dumps({"label": label}) for label in (3, 8)))
    words = ["generate", "--model", "digits", "--reward", "digit:3", "--steps", 2, "--quiet", "--out", out]
    run(*words, "--prompts", prompts, "--checkpoint", "5m", code=1)
    assert yaml.safe_load((out / "run.yaml").read_text())["how"] == {"checkpoint": "5m"}
    run("resume", out, "--quiet", code=1)
    run("resume", out, "--quiet", "--checkpoint", "never", code=1)
    run(*words, "--prompts", prompts, code=1)
    run(*words, "--config", out / "run.yaml", "--prompts", prompts, "--out", tmp_path / "other", code=1)
    assert made == [300.0, 300.0, None, 60.0, 300.0]
    assert "--checkpoint" in run(*words, "--prompts", prompts, "--checkpoint", "soon", code=2).output
    for flag in (["--checkpoint", "1h"], ["--workers", 2], ["--force"], ["--dry-run"]):
        assert "of runs of many prompts" in run(*words, *flag, code=2).output
    for flag in (["--label", 3], ["--reference", 8]):
        assert "a run of many prompts has none" in run(*words, "--prompts", prompts, *flag, code=2).output
