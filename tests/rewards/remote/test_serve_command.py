"""`steer serve-reward`: what it prints, what it serves, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from steer.cli.app import app
from steer.errors import RemoteError
from steer.rewards import Ink, Remote, from_spec


def run(*words: str, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, ["serve-reward", *words], env=env)


@pytest.mark.slow
def test_it_serves_until_it_is_interrupted(monkeypatch):
    command = [sys.executable, "-c", "from steer.cli.app import main; main()", "serve-reward", "ink", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--token-env", "TOKEN"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKEN": "secret"},
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with pytest.raises(RemoteError, match="answered 401"):
            Remote(url)
        monkeypatch.setenv("STEER_REWARD_TOKEN", "secret")
        images = (torch.arange(12) / 255).view(3, 1, 2, 2)
        torch.testing.assert_close(from_spec(f"remote:{url}")(images), Ink()(images).double())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == ""  # a token that the caller chose is not printed
    finally:
        process.kill()
        process.communicate()


def test_several_rewards_and_a_token_that_is_printed_once(monkeypatch):
    images, seen = (torch.arange(12) / 255).view(3, 1, 2, 2), {}

    def ask(server):
        for name in ("ink", "dark"):
            seen[name] = Remote(f"{server.url}/{name}", token=server.token)(images)

    monkeypatch.setattr("steer.rewards.remote.server.RewardServer.wait", ask)
    answer = run("ink", "dark=ink:-1", "--port", "0")
    light, dark, token = answer.output.split()
    assert light.endswith("/ink")
    assert dark.endswith("/dark")
    assert len(token.removeprefix("STEER_REWARD_TOKEN=")) >= 32
    torch.testing.assert_close(seen["ink"], -seen["dark"])
    monkeypatch.setattr("steer.rewards.remote.server.RewardServer.wait", lambda server: Remote(server.url)(images))
    assert len(run("ink", "--port", "0", "--no-token").output.split()) == 1


def test_an_unreachable_server_is_a_failed_run_and_no_wrong_usage(monkeypatch, tmp_path):
    monkeypatch.setattr("steer.rewards.remote.http_request.LONGEST_WAIT", 0.01)
    monkeypatch.setattr("steer.cli.subject.open_model", lambda *_, **__: SimpleNamespace(text=None))
    command = ["--model", "digits", "--reward", "remote:http://127.0.0.1:9", "--out", str(tmp_path)]
    for words in (["generate", *command], ["compare", *command], ["serve-reward", command[3]]):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 1
        said = " ".join(answer.output.split())
        assert "error: the reward Remote cannot be reached at http://127.0.0.1:9/spec" in said
        assert "must have the form" not in said


def test_wrong_usage_is_exit_code_2_and_a_taken_port_1():
    for words, said in [
        (["beauty"], "unknown reward"),
        (["ink", "--host", "0.0.0.0", "--no-token"], "needs a token"),
        (["ink", "ink:-1"], "two rewards are called 'ink'"),
        (["ink", "--memory", "100"], "has no room for one request"),
        (["ink", "--token-env", "NO_SUCH_VARIABLE"], "is not set"),
        (["ink", "--port", "70000"], "--port"),
        ([], "SPEC"),
    ]:
        answer = run(*words)
        assert answer.exit_code == 2, answer.output
        assert said in " ".join(answer.output.replace("│", " ").split())
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = run("ink", "--port", str(taken.getsockname()[1]))
    assert answer.exit_code == 1
    assert "Address already in use" in answer.output


def test_help_has_an_example():
    answer = run("--help")
    assert answer.exit_code == 0
    assert "Example: steer serve-reward jpeg:- --port 8000" in " ".join(answer.output.split())
