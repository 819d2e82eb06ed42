import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import steer
from steer import SteerError, load_run
from steer.cli import app, options, progress
from steer.core.loop import Loop

QUICK = ["--model", "digits", "--reward", "digit:3", "--steps", "4"]


def run(*words):
    return CliRunner().invoke(app.app, [str(word) for word in words])


def generate(out, *words):
    return run("generate", *QUICK, "--out", out, *words)


def test_generate_writes_everything(tmp_path):
    out = tmp_path / "threes"
    done = generate(out, "--budget", 40, "--n", 4, "--seed", 3, "--reference", 6)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "images.png", "report.html", "result.json", "result.safetensors",
    ]  # fmt: skip
    saved = load_run(out)
    assert saved.cost.nfe == 40
    assert saved.facts["reference_cost"]["nfe"] == 24
    assert saved.facts["run"]["reward"] == "digit:3"
    assert saved.key == steer.Key(3)
    assert Image.open(out / "images.png").size == (2 * 96 + 3 * 2, 2 * 96 + 3 * 2)
    from steer.rewards import from_spec

    again = steer.smc(steer.load("digits", steps=4), from_spec("digit:3"), budget=40, key=3)
    assert saved.tensors["x"].equal(again.x)
    page = (out / "report.html").read_text()
    assert "held-out judge p(3)" in page
    assert "--budget 40 --n 4 --steps 4 --seed 3 --reference 6</pre>" in page


@pytest.mark.slow
def test_a_temperature_can_be_left_to_the_run(tmp_path):
    """auto, and --set ess=...; the choice and what came of it are printed. What is no temperature is refused."""
    done = generate(tmp_path, "--temperature", "auto", "--budget", 80, "--reference", 0)
    assert done.exit_code == 0, done.output
    saved = load_run(tmp_path).facts
    assert saved["temperature_choice"]["asked"] == "ess=0.5"
    assert saved["cost"]["nfe"] == 80
    assert "chosen for ess=0.5" in done.output
    assert "in short" in done.output
    done = generate(tmp_path, "--set", "kl=0.3", "--budget", 80, "--reference", 0, "--json")
    assert json.loads(done.stdout)["temperature_choice"]["asked"] == "kl=0.3"
    assert json.loads(done.stdout)["verdict"]
    for wrong in ("cold", "-1", "0"):
        done = generate(tmp_path, f"--temperature={wrong}", "--budget", 80)
        assert done.exit_code == 2
        assert "must be" in done.output


def test_json_is_all_there_is_on_stdout(tmp_path):
    done = generate(tmp_path, "--particles", 4, "--n", 2, "--json", "--reference", 3, "--guided", 0.5)
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["cost"]["nfe"] == 16
    assert numbers["cost"]["grads"] > 0
    assert numbers["reference_cost"]["nfe"] == 12
    assert set(numbers["files"]) == {"images.png", "report.html", "result.json", "result.safetensors"}
    assert 0.0 <= numbers["metrics"]["held-out judge p(3)"]["steered"] <= 1.0


def test_best_of_n_shows_its_n_best_and_numbers_their_noise(tmp_path):
    done = generate(tmp_path, "--method", "best_of_n", "--particles", 6, "--n", 2, "--quiet", "--reference", 0)
    assert (done.exit_code, done.stdout) == (0, "")
    saved = load_run(tmp_path)
    best = saved.tensors["reward"][0].topk(2).indices.tolist()
    assert saved.facts["run"]["shown"] == [best]
    assert saved.tensors["root"].tolist() == [list(range(6))]


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["--method", "smcc"], "best_of_n"),
        (["--reward", "digit:99"], "digit:3"),
        (["--model", "digitss"], "digits-flow"),
        (["--label", "12"], "[0, 10]"),
        (["--budget", "40", "--particles", "4"], "not both"),
        (["--method", "best_of_n", "--guided", "1"], "--method smc"),
        (["--device", "abacus"], "--device cpu"),
        (["--steps", "0"], "--steps"),
        (["--temperature", "0"], "must be positive"),
        (["--set", "levls=3"], "levls is no option of smc"),
        (["--method", "dts", "--set", "levels"], "NAME=VALUE"),
        (["--method", "dts", "--set", "levels=big"], "must be a whole number"),
        (["--method", "dts", "--set", "widening=2.0"], "widening of dts must be"),
        (["--method", "dts", "--set", "budget=3"], "walkers=none"),
        (["--method", "driftlite", "--set", "control=abc"], "'vcg' or 'ecg'"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(tmp_path, words, cure):
    done = generate(tmp_path / "out", *words)
    assert done.exit_code == 2, done.output
    plain = " ".join(word for word in done.stderr.replace("│", " ").split())
    assert cure in plain
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", steer.methods())
def test_every_method_runs(tmp_path, method):
    done = generate(tmp_path, "--method", method, "--budget", 24, "--n", 2, "--reference", 0, "--json")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout)["cost"]["nfe"] <= 24
    assert load_run(tmp_path).tensors["reward"].isfinite().all()


def test_options_of_a_method_reach_it(tmp_path):
    from steer.rewards import from_spec

    words = ["--method", "dts", "--budget", 60, "--n", 2, "--reference", 0, "--quiet"]
    sets = ["--set", "levels=1,2", "--set", "build=boltzmann", "--set", "widening=(1, 0.5)"]
    assert generate(tmp_path, *words, *sets).exit_code == 0
    process, options = steer.load("digits", steps=4), {"levels": [1, 2], "build": "boltzmann", "widening": (1.0, 0.5)}
    by_hand = steer.sample(process, from_spec("digit:3"), method="dts", budget=60, key=0, **options)
    assert load_run(tmp_path).tensors["x"].equal(by_hand.x)
    page = (tmp_path / "report.html").read_text()
    assert "--set levels=1,2 --set build=boltzmann" in page
    assert '<div class="tree">' in page


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int | None, "none", None),
        (float, "2", 2.0),
        (bool, "true", True),
        (bool, "1", SteerError),
        (int, "2.5", SteerError),
        (int, "true", SteerError),
        (str, "cpu", "cpu"),
        (tuple[float, float], "1,2", (1.0, 2.0)),
        (tuple[float, float], "1,2,3", SteerError),
        (int | Sequence[int], "[1, 2, 3]", (1, 2, 3)),
        (Literal["a", "b"], "b", "b"),
        (Literal["a", "b"], "c", SteerError),
    ],
)
def test_values_are_typed_by_the_signature(hint, text, value):
    def method(process, reward, *, own=None):
        del process, reward, own

    method.__annotations__ = {"own": hint}
    if value is SteerError:
        with pytest.raises(SteerError, match="own of m must be"):
            options.parsed("m", method, [f"own={text}"])
        return
    found = options.parsed("m", method, [f"own={text}"])["own"]
    assert (found, type(found)) == (value, type(value))


def test_methods_are_listed_with_their_options():
    found = {entry["name"]: entry for entry in json.loads(run("methods", "--json").stdout)["methods"]}
    assert list(found) == list(steer.methods())
    assert found["dts"]["options"]["widening"] == "(2.0,0.8)"
    assert "start" not in found["dts"]["options"]
    assert found["best_of_n"]["returns"].startswith("N unsteered samples")
    assert "driftlite" in run("methods").stdout


def test_letters_run_at_their_own_steps(tmp_path):
    words = [
        "--model",
        "letters",
        "--reward",
        "letters:e",
        "--method",
        "smc",
        "--particles",
        6,
        "--n",
        3,
        "--reference",
        4,
    ]
    done = run("generate", *words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    saved = load_run(tmp_path)
    assert (saved.cost.nfe, saved.facts["run"]["steps"]) == (6 * 8, 8)
    shown = saved.result(steer.load("letters")).take(torch.tensor(saved.facts["run"]["shown"])).texts
    assert f"samples      {', '.join(shown)}" in done.stdout
    assert "NFE          48 network rows, and 32 for the unsteered samples" in done.stdout
    assert saved.tensors["reward"].max() >= 1.0
    assert not (tmp_path / "images.png").exists()
    refused = run("generate", "--model", "digits", "--reward", "letters:e", "--out", tmp_path / "no")
    assert (refused.exit_code, "reads text" in refused.output) == (2, True)
    done = run("compare", *words[:4], "--methods", "dts", "--set", "dts.levels=2", "--budget", "16,32", "--keys", 2,
               "--out", tmp_path / "c")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Samples of the first seed" in (tmp_path / "c" / "report.html").read_text()


def test_report_writes_a_saved_run_again(tmp_path):
    generate(tmp_path, "--particles", 6, "--n", 4, "--reference", 3, "--quiet", "--seed", 2, "--temperature", 0.5)
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    done = run("report", tmp_path, "--n", 4)
    assert done.exit_code == 0, done.output
    after = (tmp_path / "report.html").read_text()

    def numbers(page):
        found = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
        found["reference_cost"] = found["cost"] = None
        return found

    assert numbers(after) == numbers(before)
    assert after.count("<svg") == before.count("<svg") == 4


def test_report_draws_a_saved_tree_again(tmp_path):
    generate(tmp_path, "--method", "dts_star", "--budget", 40, "--n", 2, "--reference", 0, "--quiet")
    done = run("report", tmp_path, "--out", tmp_path / "again", "--n", 2)
    assert done.exit_code == 0, done.output
    pages = [(folder / "report.html").read_text() for folder in (tmp_path, tmp_path / "again")]
    trees = [page.partition('<div class="tree">')[2].partition("</section>")[0] for page in pages]
    assert trees[0] == trees[1] != ""


def test_a_damaged_run_is_reported_in_one_line(tmp_path):
    generate(tmp_path, "--particles", 2, "--n", 2, "--reference", 0, "--quiet")
    path = tmp_path / "result.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("report", tmp_path)
    assert done.exit_code == 1
    assert "result.safetensors is not the file that was saved" in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", [["generate"], ["compare", "--budget", "24"]])
def test_where_nothing_can_be_written_nothing_is_paid(tmp_path, monkeypatch, command):
    from steer import rewards

    def paid(*_, **__):
        raise AssertionError("the network was paid for")

    monkeypatch.setattr(rewards.DigitLogProb, "__call__", paid)
    (tmp_path / "file").write_text("")
    done = run(*command, *QUICK, "--out", tmp_path / "file" / "runs")
    assert done.exit_code == 1, done.output
    assert "nothing was run" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_json_is_strict_where_samples_are_forbidden(tmp_path, monkeypatch):
    from steer import rewards

    def forbidding(self, images):
        mean = images.mean((1, 2, 3))
        return torch.where(mean > mean.median(), mean, -torch.inf)

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    monkeypatch.setattr(rewards.DigitLogProb, "__call__", forbidding)
    words = ["--method", "rollout", "--particles", 4, "--n", 2, "--reference", 0, "--json", "--temperature", "inf"]
    done = generate(tmp_path / "a", *words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout, parse_constant=no_constant)["temperature"] is None
    done = run("compare", *QUICK, "--budget", 24, "--keys", 1, "--json", "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout, parse_constant=no_constant)
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=no_constant)


def test_report_of_a_run_saved_from_python_says_how(tmp_path):
    steer.smc(steer.load("digits", steps=2), lambda x: x.mean((1, 2, 3)), particles=2).save(tmp_path)
    done = run("report", tmp_path)
    assert done.exit_code == 2
    assert "Saved.result(process)" in " ".join(done.stderr.replace("│", " ").split())


def test_failure_at_run_time_exits_1_with_one_line(tmp_path):
    done = generate(tmp_path, "--budget", 3)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "raise the budget to 4" in done.stderr
    failed = generate(tmp_path, "--budget", 3, "--json")
    assert json.loads(failed.stdout)["error"]["type"] == "BudgetError"
    with pytest.raises(steer.BudgetError):
        CliRunner().invoke(
            app.app, ["generate", *QUICK, "--out", str(tmp_path), "--budget", "3", "--debug"], catch_exceptions=False
        )


def test_a_file_in_the_way_is_noticed_before_anything_is_spent(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("here first")
    monkeypatch.setattr("steer.cli.subject.open_model", lambda *_: pytest.fail("the model was loaded"))
    assert generate(tmp_path / "out").exit_code == 2
    monkeypatch.undo()
    done = generate(tmp_path / "out" / "below", "--particles", 2)
    assert done.exit_code == 1
    assert "error:" in done.stderr
    assert "network rows" not in done.stderr


def test_a_reward_that_is_watched_still_says_what_it_is():
    """Its bounds, unit and whether it has a gradient are attributes of its class; the record has its own name."""
    from steer import rewards

    reward = rewards.JPEGSize()
    watched = progress.Watch(10, "smc", True, progress.Interrupt()).watching(reward)
    assert watched.spec == reward.spec
    run = steer.sample(steer.load("digits", steps=2), watched, method="best_of_n", budget=4)
    assert run.made_by.reward == "JPEGSize"
    with pytest.raises(steer.NotDifferentiableError, match="says that it has none"):
        steer.tds(steer.load("digits", steps=2), watched, particles=2)


def test_progress_without_a_terminal_is_a_line_every_tenth(tmp_path):
    done = generate(tmp_path, "--particles", 8, "--n", 2, "--reference", 0)
    lines = [line for line in done.stderr.splitlines() if "network rows" in line]
    assert len(lines) == 4
    assert "smc: 32 of 32 network rows, step 4 of 4, ESS" in lines[-1]
    assert "best" in lines[0]


def test_compare_has_best_of_n_and_equal_budgets(tmp_path):
    done = run(
        "compare", *QUICK, "--methods", "smc", "--budget", 24, "--keys", 2, "--n", 3, "--out", tmp_path, "--json"
    )
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers == {"out": str(tmp_path), **json.loads((tmp_path / "compare.json").read_text())}
    assert [row["method"] for row in numbers["rows"]] == ["rollout", "best_of_n", "smc"]
    assert {row["nfe"] for row in numbers["rows"]} == {24.0}
    assert numbers["rows"][1]["ess"] == pytest.approx(3.0)
    assert all((tmp_path / name / "images.png").is_file() for name in ("rollout", "best_of_n", "smc"))
    assert (tmp_path / "report.html").is_file()


def test_compare_at_several_budgets(tmp_path):
    words = ["--methods", "smc,dts", "--set", "dts.levels=1", "--keys", 2, "--n", 3, "--out", tmp_path]
    done = run("compare", *QUICK, *words, "--budget", "48,24", "--json")
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["budgets"]
    assert [stage["budget"] for stage in stages] == [24, 48]
    assert [{row["method"]: row["nfe"] for row in stage["rows"]}["smc"] for stage in stages] == [24, 48]
    page = (tmp_path / "report.html").read_text()
    assert "mean reward against NFE" in page
    assert "--budget 48,24" in page
    for bad, cure in ((["--budget", "24,many"], "500,1000,2000"), (["--set", "levels=1"], "METHOD.NAME=VALUE")):
        done = run("compare", *QUICK, *words, *bad)
        assert (done.exit_code, cure in done.stderr) == (2, True)


def test_models_lists_what_ships():
    done = run("models", "--json")
    assert done.exit_code == 0
    found = {entry["name"]: entry for entry in json.loads(done.stdout)["models"]}
    assert set(found) >= {"digits", "digits-flow", "letters", "digits-classifier", "digits-judge"}
    assert [found[name]["kind"] for name in ("digits", "digits-flow")] == ["diffusion", "flow"]
    judge = steer_parameters("digits-judge")
    assert found["digits-judge"]["parameters"] == judge
    assert "digits-judge" in run("models").stdout


def steer_parameters(name):
    from steer.rewards.digits import load_digit_net

    return sum(parameter.numel() for parameter in load_digit_net(name).parameters())


def test_models_tolerates_a_folder_without_papers(tmp_path):
    from steer.models.catalogue import _card

    card = _card(tmp_path)
    assert (card["parameters"], card["measured"], card["licence"]) == (0, "–", "–")


@pytest.mark.parametrize("command", ["generate", "compare", "report", "models", "methods"])
def test_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert re.search(f"Examples?: steer {command}", done.stdout)


@pytest.mark.parametrize("method", ["rollout", "best_of_n", "smc"])
def test_ctrl_c_keeps_the_particles_of_every_method(tmp_path, monkeypatch, method):
    call = progress.Watch.__call__

    def interrupted(self, event):
        if event.level == 2:
            signal.raise_signal(signal.SIGINT)
        call(self, event)

    monkeypatch.setattr(progress.Watch, "__call__", interrupted)
    before = signal.getsignal(signal.SIGINT)
    done = generate(tmp_path, "--method", method, "--particles", 5, "--n", 2, "--quiet")
    assert signal.getsignal(signal.SIGINT) is before
    assert done.exit_code == 1
    assert str(tmp_path) in done.stderr.replace("\n", "")
    saved = load_run(tmp_path)
    assert saved.facts["interrupted"] is True
    assert saved.tensors["x"].shape == (1, 5, 1, 8, 8)
    assert saved.cost.nfe <= 15
    assert saved.facts["reference_cost"] is None
    assert len(saved.facts["run"]["shown"][0]) == 2
    assert "Stopped early" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("method", ["smc", "dts"])
def test_a_run_that_fails_writes_what_it_had(tmp_path, monkeypatch, method, error):
    call = progress.Watch.__call__

    def fails(self, event):
        call(self, event)
        if self._meter.nfe >= 24:
            raise error

    monkeypatch.setattr(progress.Watch, "__call__", fails)
    monkeypatch.setattr(Loop, "steps", lambda self: nullcontext())  # also a Ctrl-C where it ends no run in good order
    done = generate(tmp_path, "--method", method, "--budget", 40, "--n", 2)
    assert done.exit_code == 1
    assert "what the run had until then is in" in done.stderr
    facts = json.loads((tmp_path / "partial.json").read_text())
    assert facts["about"]["reward"] == "digit:3"
    state = steer.load_trajectory(tmp_path / "partial.safetensors", steer.load("digits", steps=4))
    assert state.x.shape[2:] == (1, 8, 8)
    assert bool(state.x.isfinite().all())
    monkeypatch.undo()
    assert generate(tmp_path, "--method", method, "--budget", 40, "--n", 2).exit_code == 0
    assert not list(tmp_path.glob("partial.*"))


def test_unsteered_samples_that_fail_cost_no_steered_ones(tmp_path, monkeypatch):
    def broken(*_):
        raise SteerError("out of memory")

    monkeypatch.setattr("steer.cli.generate.unsteered_run", broken)
    done = generate(tmp_path, "--budget", 40, "--n", 2, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["partial"] == str(tmp_path)
    assert load_run(tmp_path).cost.nfe == 40


def test_a_comparison_of_which_a_run_fails_says_so_and_goes_on(tmp_path, monkeypatch):
    call, calls = progress.Watch.__call__, []

    def fails(self, event):
        call(self, event)
        calls.append(event.run)
        if event.run == "smc" and calls.count("smc") == 7:
            raise SteerError("broken")

    monkeypatch.setattr(progress.Watch, "__call__", fails)
    done = run("compare", *QUICK, "--methods", "smc", "--budget", 24, "--keys", 3, "--out", tmp_path)
    assert done.exit_code == 1
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert facts["keys"] == 3
    assert [row["failed"] for row in facts["rows"]] == [[], [], ["SteerError: broken"]]
    assert "smc failed on 1 of 3 seeds: SteerError: broken" in done.stdout


def test_ctrl_c_in_a_comparison_writes_nothing(tmp_path, monkeypatch):
    call = progress.Watch.__call__

    def interrupted(self, event):
        signal.raise_signal(signal.SIGINT)
        call(self, event)

    monkeypatch.setattr(progress.Watch, "__call__", interrupted)
    done = run("compare", *QUICK, "--budget", 24, "--keys", 2, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "interrupted; nothing was written" in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals to another process")
def test_sigterm_to_a_real_process(tmp_path):
    """What job schedulers send before they kill; SIGINT is sent by the tests above."""
    out = tmp_path / "out"
    command = "from steer.cli.app import main; main()"
    words = ["generate", "--model", "digits", "--reward", "digit:3", "--steps", "300", "--particles", "8"]
    with subprocess.Popen(
        [sys.executable, "-c", command, *words, "--n", "4", "--out", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            first = process.stderr.readline()  # the first tenth is done
            assert "network rows" in first, first + process.stderr.read()
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - began < 60
    saved = load_run(out)
    assert saved.facts["interrupted"]
    assert 240 <= saved.cost.nfe < 300 * 8
    assert (out / "report.html").is_file()


def test_more_steps_than_a_model_knows_are_named(tmp_path):
    done = run("generate", "--model", "digits", "--reward", "digit:3", "--steps", "1001", "--out", tmp_path / "x")
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert "no grid of 1001 steps" in " ".join(done.output.split())


@pytest.mark.slow
def test_a_directory_holds_one_command_s_files(tmp_path):
    """What an earlier command left would be taken for this one's."""
    assert generate(tmp_path, "--budget", 40, "--n", 2, "--reference", 2).exit_code == 0
    assert (tmp_path / "images.png").exists()
    letters = ["--model", "letters", "--reward", "letters:e", "--budget", 64, "--n", 2, "--reference", 2]
    done = run("generate", *letters, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "images.png").exists()
    done = run("compare", *QUICK, "--methods", "smc", "--budget", 40, "--keys", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "compare.json").exists()
    assert not (tmp_path / "result.json").exists()
    assert generate(tmp_path, "--budget", 40, "--n", 2, "--reference", 2).exit_code == 0
    assert not (tmp_path / "compare.json").exists()
