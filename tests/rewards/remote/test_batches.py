"""Requests of several clients, scored by one call: whose scores they are, and what is never scored together."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from remote_rewards import Tagged, connect, numbered

from steer.errors import RewardError
from steer.rewards.remote.client import Remote
from steer.rewards.remote.http_request import in_parallel
from steer.rewards.remote.server import serve
from steer.rewards.remote.wire_format import Limits, encode_parts, encode_request, max_decoded_bytes
from steer.types import RewardSpec

PATIENCE = {"retries": 0, "timeout": 5.0, "queue_timeout": 5.0}  # a server that lost a request fails its test, and soon


class Held(Tagged):
    """Its first call waits until it is let go, so that what comes meanwhile waits together. Notes rows of its calls."""

    def __init__(self, spec=Tagged.spec, fails_on=None):
        self.spec, self.fails_on, self.calls = spec, fails_on, []
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, samples, *, prompts=None):
        self.calls.append(len(samples))
        if len(self.calls) == 1:
            self.entered.set()
            assert self.go.wait(20)
        scores = super().__call__(samples, prompts=prompts)
        if self.fails_on is not None and (scores == self.fails_on).any():
            raise RuntimeError("a bad sample")
        return scores


@contextmanager
def waiting(reward, asked, **options):
    """A server that is busy, with all these calls of a Remote waiting in order; then let go, and what each gave.

    asked: functions of a Remote.
    """
    with serve(reward, **options) as server, ThreadPoolExecutor(1 + len(asked)) as pool:
        remote = connect(server, **PATIENCE)
        first = pool.submit(remote, numbered(1, first=255))
        assert reward.entered.wait(10)
        futures = []
        for place, ask in enumerate(asked, 1):
            futures.append(pool.submit(ask, remote))
            until(lambda place=place: len(server._queue._waiting) == place)
        reward.go.set()
        first.result(20)
        yield futures


def until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def of(rows, first, prompt=None):
    """A call of a Remote with numbered samples, and the scores that it must have."""
    prompts = None if prompt is None else [prompt] * rows
    return lambda remote: torch.equal(
        remote(numbered(rows, first), prompts=prompts), Tagged()(numbered(rows, first), prompts=prompts)
    )


def test_requests_that_wait_together_are_one_call_and_keep_their_scores():
    reward = Held()
    asked = [of(3, 10 * i, "a" * i) for i in range(1, 6)]
    with waiting(reward, asked, batch=8) as futures:
        assert all(future.result(20) for future in futures)
    assert reward.calls == [1, 6, 6, 3]


@pytest.mark.parametrize(
    ("reward", "options"),
    [(Held(), {}), (Held(), {"batch": 1}), (Held(RewardSpec(scope="groupwise", prompts=True)), {"batch": 64})],
    ids=["by default", "one", "groupwise"],
)
def test_every_request_is_a_call_of_its_own_where_it_must(reward, options):
    with waiting(reward, [of(2, 10), of(2, 20), of(2, 30)], **options) as futures:
        assert all(future.result(20) for future in futures)
    assert reward.calls == [1, 2, 2, 2]


def test_kinds_of_samples_are_scored_apart():
    """Another size, and requests with and without prompts, in one batch of requests."""
    reward, wide = Held(), torch.full((2, 3, 4, 9), 51 / 255)
    asked = [of(2, 10), lambda remote: torch.equal(remote(wide), Tagged()(wide).double()), of(2, 30, "abc"), of(1, 40)]
    with waiting(reward, asked, batch=64) as futures:
        assert all(future.result(20) for future in futures)
    assert sorted(reward.calls) == [1, 2, 2, 3]


def test_rewards_are_not_mixed():
    first, second = Held(), Held()
    second.go.set()
    with serve({"first": first, "second": second}, batch=64) as server, ThreadPoolExecutor(5) as pool:
        options = {"token": server.token, **PATIENCE}
        remotes = [Remote(f"{server.url}/{name}", **options) for name in ("first", "second")]
        pool.submit(remotes[0], numbered(1))
        assert first.entered.wait(10)
        asked = []
        for place, which in enumerate((0, 1, 0, 1), 1):
            asked.append(pool.submit(of(2, 10 * place), remotes[which]))
            until(lambda place=place: len(server._queue._waiting) == place)
        first.go.set()
        assert all(future.result(20) for future in asked)
    assert (first.calls, second.calls) == ([1, 4], [4])


def test_a_request_that_fails_fails_alone():
    reward = Held(fails_on=21.0)
    with waiting(reward, [of(2, 10), of(2, 20), of(2, 30)], batch=64) as futures:
        assert futures[0].result(20)
        assert futures[2].result(20)
        with pytest.raises(RewardError, match="a bad sample"):
            futures[1].result(20)
    assert reward.calls == [1, 6, 2, 2, 2]


def test_what_cannot_be_decoded_is_told_to_its_client_alone():
    reward = Held()
    first, second = encode_parts(numbered(2, 20), "png", "test")
    body = encode_request([first, second[:40]], None, "png")  # whose headers are right

    def broken(remote):
        return in_parallel(
            lambda client, content: remote._ask(client, "/score", content, 1 << 20),
            [body],
            url=remote.url,
            headers={"Authorization": f"Bearer {remote.token}", "Content-Type": "application/octet-stream"},
            parallel=1,
            name="broken",
        )

    with waiting(reward, [of(2, 10), broken, of(2, 30)], batch=64) as futures:
        assert futures[0].result(20)
        assert futures[2].result(20)
        with pytest.raises(RewardError, match="400"):
            futures[1].result(20)
    assert reward.calls == [1, 4]


def test_they_take_no_more_memory_than_the_largest_request():
    """A request here has 120 numbers, and the largest may have 300: two are decoded at once, and not three."""
    reward, limits = Held(), Limits(600, 300)
    memory = max_decoded_bytes(limits) + 5 * limits.bytes
    options = {"max_bytes": limits.bytes, "max_pixels": limits.pixels, "memory": memory}
    with waiting(reward, [of(2, 10 * i) for i in range(1, 5)], batch=64, **options) as futures:
        assert all(future.result(20) for future in futures)
    assert reward.calls == [1, 4, 4]


def test_clients_that_leave_take_their_requests_out_of_the_batch(monkeypatch):
    monkeypatch.setattr("steer.rewards.remote.web_app.BLANK_SECONDS", 0.02)
    reward = Held()
    with serve(reward, batch=64) as server, ThreadPoolExecutor(4) as pool:
        remote, hasty = connect(server, **PATIENCE), connect(server, retries=0, timeout=0.3, queue_timeout=0)
        first = pool.submit(remote, numbered(1))
        assert reward.entered.wait(10)
        asked = [pool.submit(of(2, 10), each) for each in (remote, hasty, remote)]
        with pytest.raises(RewardError):
            asked[1].result(20)
        until(lambda: any(future.cancelled() for future, _ in server._queue._waiting))
        reward.go.set()
        assert asked[0].result(20)
        assert asked[2].result(20)
        first.result(20)
    assert reward.calls == [1, 4]


def test_arguments_are_checked():
    with pytest.raises(RewardError, match="batch"):
        serve(Tagged(), batch=0)
