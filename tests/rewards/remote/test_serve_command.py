"""`steer serve-reward`: what it prints, what it serves, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from steer.cli.app import app
from steer.errors import RewardError
from steer.rewards import Ink, Remote, from_spec


def run(*words: str, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, ["serve-reward", *words], env=env)


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
        with pytest.raises(RewardError, match="answered 401"):
            Remote(url)
        monkeypatch.setenv("STEER_REWARD_TOKEN", "secret")
        images = (torch.arange(12) / 255).view(3, 1, 2, 2)
        torch.testing.assert_close(from_spec(f"remote:{url}")(images), Ink()(images).double())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.communicate()


def test_wrong_usage_is_exit_code_2_and_a_taken_port_1():
    for words, said in [
        (["beauty"], "unknown reward"),
        (["ink", "--host", "0.0.0.0"], "needs a token"),
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
