"""The server of rewards: under load, against requests that mean it no good, and what it lets whom do."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import pickle
import runpy
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from remote_rewards import Tagged, connect, numbered

from steer import rewards
from steer.errors import RemoteError, RewardError
from steer.rewards.pil_images import to_pictures, to_png
from steer.rewards.remote.client import Remote
from steer.rewards.remote.scoring_queue import Memory
from steer.rewards.remote.server import serve
from steer.types import RewardSpec

# -- under load


@pytest.mark.slow
def test_two_hundred_at_once_lose_and_swap_nothing():
    """More clients than places: the rest hear 503 and come again."""
    refused = []

    class Slow(Tagged):
        def __call__(self, samples, *, prompts=None):
            time.sleep(0.002)
            return super().__call__(samples, prompts=prompts)

    with serve(Slow(), queue=8) as server:
        submit = server._queue.submit

        def counted(work):
            future = submit(work)
            refused.append(future is None)
            return future

        server._queue.submit = counted
        remote = connect(server, parallel=1)

        def ask(first: int) -> bool:
            images = numbered(3, first)
            return torch.equal(remote(images, prompts=["a" * first] * 3), Tagged()(images, prompts=["a" * first] * 3))

        with ThreadPoolExecutor(200) as pool:
            assert all(pool.map(ask, range(200)))
    assert len(refused) >= 200
    assert any(refused)


def test_a_full_queue_is_503_and_reported_when_it_lasts():
    hold, entered = threading.Event(), threading.Event()

    def slow(samples):
        entered.set()
        hold.wait(10)
        return samples.mean((1, 2, 3))

    with serve(slow, queue=1) as server, ThreadPoolExecutor(1) as pool:
        remote = connect(server, retries=2, queue_timeout=0)
        first = pool.submit(remote, numbered(1))
        assert entered.wait(5)
        with pytest.raises(RewardError, match=r"answered 503.*queue.*\(tried 3 times\)"):
            remote(numbered(1))
        hold.set()
        assert first.result().shape == (1,)


def test_the_queues_wait_does_not_count(monkeypatch):
    """Six requests of 0.15 s on one thread, with a timeout of 0.4 s."""
    monkeypatch.setattr(rewards.remote.web_app, "BLANK_SECONDS", 0.05)

    def slow(samples):
        time.sleep(0.15)
        return samples[:, 0, 0, 0] * 255

    with serve(slow) as server:
        remote, began = connect(server, timeout=0.4, batch=1, parallel=6), time.monotonic()
        assert remote(numbered(6)).tolist() == pytest.approx(list(range(6)))
        assert time.monotonic() - began > 0.9


def test_what_fails_after_its_wait_is_told_in_the_body(monkeypatch):
    monkeypatch.setattr(rewards.remote.web_app, "BLANK_SECONDS", 0.02)

    def broken(samples):
        time.sleep(0.1)
        raise ZeroDivisionError("by zero")

    with serve(broken) as server, pytest.raises(RemoteError, match=r"answered 500: .*raised ZeroDivisionError"):
        connect(server)(numbered(1))


def test_requests_of_clients_that_left_are_not_scored(monkeypatch):
    monkeypatch.setattr(rewards.remote.web_app, "BLANK_SECONDS", 0.05)
    scored, go = [], threading.Event()

    def slow(samples):
        scored.append(len(samples))
        go.wait(60)
        return samples.mean((1, 2, 3))

    with serve(slow) as server:
        with pytest.raises(RemoteError, match="gave no answer"):  # one is being scored, five wait
            connect(server, timeout=0.3, batch=1, parallel=6)(numbered(6))
        time.sleep(0.3)  # what was sent has come
        while not all(future.cancelled() for future, _ in server._queue._waiting):  # a loaded machine takes longer
            time.sleep(0.01)
        go.set()
        assert connect(server)(numbered(2)).shape == (2,)
    assert scored == [1, 2]


def test_decoding_waits_for_memory(monkeypatch):
    """Eight threads, and memory for two requests of the largest size."""
    most = 300_000
    under_way, peak, lock = [0], [0], threading.Lock()
    decode = rewards.remote.answers.decode_samples

    def counted(request, max_pixels):
        with lock:
            under_way[0] += 1
            peak[0] = max(peak[0], under_way[0])
        time.sleep(0.05)
        return decode(request, max_pixels)

    def reward(samples):
        with lock:
            under_way[0] -= 1
        return samples.mean((1, 2, 3))

    monkeypatch.setattr(rewards.remote.answers, "decode_samples", counted)
    images = torch.zeros(8, 3, 310, 310)
    with serve(reward, threads=8, max_pixels=most, max_bytes=10_000, memory=2 * 10 * most + 100_000) as server:
        assert connect(server, batch=1, parallel=8)(images).shape == (8,)
    assert peak == [2]


def test_memory_for_bodies_leaves_room_to_decode():
    memory = Memory(100, reserve=40)
    first, second = memory.body(50), memory.body(20)
    assert first is not None
    assert second is None  # 70 would leave 30 of the 40
    with memory.decoding(40), memory.decoding(10):
        assert memory.body(1) is None
    first.release()
    first.release()
    assert memory.body(60) is not None
    assert memory.body(1) is None
    with pytest.raises(RewardError, match="has no room for one request"):
        serve(Tagged(), memory=1 << 20)


def test_the_header_is_split_with_the_batch():
    """Prompts of more than a megabyte, with and without other limits near."""
    tokens, prompts = torch.zeros(4096, 2, dtype=torch.int64), ["p" * 300] * 4090 + ["猫" * 60] * 6

    def length(samples, *, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    with serve(length) as server:
        found = connect(server, batch=4096, encoding="tensor")(tokens, prompts=prompts)
        assert found.tolist() == [300.0] * 4090 + [60.0] * 6
        long = connect(server, encoding="tensor")(tokens[:20], prompts=["p" * 70_000] * 20)
        assert long.tolist() == [70_000.0] * 20
        with pytest.raises(RewardError, match="prompt 1 alone has"):
            connect(server, encoding="tensor")(tokens[:2], prompts=["a", "p" * 1_100_000])


def dead(raw: socket.socket) -> bool:
    raw.settimeout(2)
    try:
        return raw.recv(10) == b""
    except ConnectionError:
        return True


def test_connections_that_say_nothing_hold_nothing(monkeypatch):
    """No thread, no file beyond the most, and none of them for long."""
    monkeypatch.setattr(rewards.remote.connections, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(rewards.remote.connections, "most_connections", lambda: 20)
    with serve(Tagged()) as server:
        connect(server)(numbered(1))
        threads = threading.active_count()
        silent = [socket.create_connection(server.address, timeout=2) for _ in range(60)]
        for raw in silent:
            with contextlib.suppress(ConnectionError):
                raw.sendall(b"GET /spec HTTP/1.1\r\nX: ")
        assert connect(server)(numbered(2)).tolist() == [0.0, 1.0]
        assert threading.active_count() == threads
        assert len(server._http.server_state.connections) <= 20
        for _ in range(6):  # a byte now and then does not help
            time.sleep(0.1)
            for raw in silent:
                with contextlib.suppress(OSError):
                    raw.sendall(b"a")
        assert all(map(dead, silent))
        for raw in silent:
            raw.close()


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(rewards.remote.web_app, "BODY_SECONDS", 0.2)
    with serve(Tagged()) as server, socket.create_connection(server.address, timeout=5) as raw:
        token = f"Authorization: Bearer {server.token}"
        raw.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{token}\r\nContent-Length: 1000\r\n\r\nx".encode())
        assert b" 408 " in raw.recv(200)
        assert connect(server)(numbered(1)).shape == (1,)


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_the_middle_goes_unnoticed():
    calls = threading.Event()

    class Slow(Tagged):
        def __call__(self, samples, *, prompts=None):
            calls.set()
            time.sleep(0.005)
            return super().__call__(samples, prompts=prompts)

    server = serve(Slow(), token="kept")
    port = server.address[1]
    remote = connect(server, batch=1, parallel=8, retries=100)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(remote, numbered(100))
        assert calls.wait(5)
        server.close()
        time.sleep(0.2)
        assert not answer.done()
        with serve(Slow(), port=port, token="kept"):
            assert answer.result(timeout=30).tolist() == list(range(100))


def test_another_version_after_a_restart_is_an_error():
    class Newer(Tagged):
        spec = RewardSpec(version="v2")

    server = serve(Tagged(), token="kept")
    remote = connect(server)
    server.close()
    with (
        serve(Newer(), port=server.address[1], token="kept"),
        pytest.raises(RewardError, match=r"was Tagged \(version v1\).*is Tagged \(version v2\) now"),
    ):
        remote(numbered(1))


# -- refusals


def post(server, body: bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.address, timeout=5)
    connection.request("POST", "/score", body, {"Authorization": f"Bearer {server.token}", **headers})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def framed(header: object, *parts: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(4, "big") + raw + b"".join(parts)


def bomb(side: int) -> bytes:
    """A PNG file of a few kilobytes that stands for side x side black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


PNG = to_png(to_pictures(torch.zeros(1, 3, 4, 4), "it")[0])
OTHER = to_png(to_pictures(torch.zeros(1, 3, 4, 5), "it")[0])


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "expected a request with a header"),
        (b"\xff\xff\xff\xff{}", "announce one of 4294967295"),
        (framed(b"{"), "to be JSON"),
        (framed([1]), "to be a JSON object, got list"),
        (framed(b"[" * 100_000), "JSON"),
        (framed(b'{"sizes": [NaN]}'), "to be JSON"),
        (framed({"encoding": "pickle", "sizes": [3]}, pickle.dumps(1)), "got 'pickle'"),
        (framed({"encoding": "png", "sizes": []}), "at least one sample"),
        (framed({"encoding": "png", "sizes": [-1, 1]}), "sizes"),
        (framed({"encoding": "png", "sizes": [9]}, b"123"), "expected 9 bytes after the header, got 3"),
        (framed({"encoding": "png", "sizes": [len(PNG)], "prompts": ["a", "b"]}, PNG), "expected 1 prompts"),
        (framed({"encoding": "png", "sizes": [len(PNG)], "prompts": [1]}, PNG), "expected 1 prompts"),
        (framed({"encoding": "png", "sizes": [3]}, b"GIF"), "do not begin like one"),
        (framed({"encoding": "png", "sizes": [len(gif())]}, gif()), "do not begin like one"),
        (framed({"encoding": "png", "sizes": [45]}, PNG[:45]), "PNG file"),
        (framed({"encoding": "png", "sizes": [len(bomb(60_000))]}, bomb(60_000)), "at most 100000 numbers"),
        (framed({"encoding": "png", "sizes": [len(PNG)] * 2 + [len(OTHER)]}, PNG, PNG, OTHER), "one shape"),
        (framed({"encoding": "tensor", "sizes": [4]}, b"what"), "safetensors"),
        (framed({"encoding": "tensor", "sizes": [8]}, b"\xff" * 8), "safetensors"),
    ],
)
def test_malformed_requests_are_answered_400(body: bytes, said: str):
    with serve(Tagged(), max_pixels=100_000) as server:
        status, answer = post(server, body)
        assert status == 400
        assert said in json.loads(answer)["error"]
        assert post(server, framed({"encoding": "png", "sizes": [len(PNG)]}, PNG))[0] == 200  # and it goes on


@pytest.mark.slow
def test_oversized_requests_are_refused_before_they_are_read():
    with serve(Tagged(), max_bytes=1000) as server:
        status, answer = post(server, b"x" * 5000)
        assert status == 413
        assert "at most 1000 bytes, got 5000" in answer
        for header, status in [
            ("Content-Length: 99999999999999999999", b" 413 "),
            ("Transfer-Encoding: chunked", b" 411 "),
            ("Content-Length: -5", b" 400 "),
            ("Content-Length: many", b" 400 "),
        ]:
            with socket.create_connection(server.address, timeout=5) as raw:
                token = f"Authorization: Bearer {server.token}"
                raw.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{token}\r\n{header}\r\n\r\n".encode())
                assert status in raw.recv(200)


def test_a_wrong_token_is_refused():
    with serve(Tagged(), token="secret") as server:
        assert connect(server)(numbered(2)).tolist() == [0.0, 1.0]
        for token in (None, "Secret", "secrets", "secre"):
            with pytest.raises(RewardError, match="answered 401"):
                connect(server, token=token)
        for token in ("secret\n", "sécret"):
            with pytest.raises(RewardError, match="not printable ASCII"):
                connect(server, token=token)
        assert post(server, framed({"encoding": "png", "sizes": [len(PNG)]}, PNG), Authorization="")[0] == 401
        assert "secret" not in repr(connect(server))


def test_a_token_is_made_up_unless_it_is_declined_on_this_machine():
    with serve(Tagged()) as server, serve(Tagged()) as other:
        assert len(server.token) >= 32
        assert server.token != other.token
        with pytest.raises(RemoteError, match=r"answered 401.*STEER_REWARD_TOKEN"):
            Remote(server.url)
    with serve(Tagged(), token=False) as server:
        assert server.token is None
        assert Remote(server.url)(numbered(1)).shape == (1,)
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(RewardError, match="can be reached from other machines and needs a token"):
            serve(Tagged(), host=host, token=False)
    serve(Tagged(), host="0.0.0.0").close()
    for wrong in ("", True):
        with pytest.raises(RewardError, match="None to make one up, or False for none"):
            serve(Tagged(), token=wrong)


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_it_listens_on_other_kinds_of_addresses(host: str):
    try:
        server = serve(Tagged(), host=host)
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    with server:
        assert server.url.startswith("http://[::1]:" if host == "::1" else "http://127.0.0.1:")
        assert connect(server)(numbered(3)).tolist() == [0.0, 1.0, 2.0]


def test_several_rewards_stand_behind_one_server():
    with serve({"tagged": Tagged(), "mean": lambda samples: samples.mean((1, 2, 3))}) as server:
        for name, right in (("tagged", torch.arange(3.0)), ("mean", numbered(3).mean((1, 2, 3)))):
            remote = Remote(f"{server.url}/{name}", token=server.token)
            torch.testing.assert_close(remote(numbered(3)), right.double())
        for path in ("", "/other"):
            with pytest.raises(RemoteError, match=r"answered 404.*there are the rewards mean, tagged"):
                Remote(server.url + path, token=server.token)
    for wrong in ({}, {"a/b": Tagged()}, {"": Tagged()}):
        with pytest.raises(RewardError, match="takes rewards by names of letters"):
            serve(wrong)


def test_what_the_reward_raises_reaches_the_client_by_name():
    def broken(samples):
        raise ZeroDivisionError("by zero")

    with serve(broken) as server, pytest.raises(RewardError, match=r"answered 500.*broken raised ZeroDivisionError"):
        connect(server)(numbered(1))
    with serve(lambda samples: samples) as server, pytest.raises(RewardError, match=r"500.*one score per sample"):
        connect(server)(numbered(1))


@contextlib.contextmanager
def own_server(app):
    """A server of one's own, with its defaults: the address of an ASGI application."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    app.state.queue.close()


@pytest.mark.parametrize("token", ["secret", None])
def test_the_application_stands_on_a_server_of_ones_own(token):
    with own_server(rewards.asgi({"tagged": Tagged()}, token=token, batch=8)) as url:
        remote = Remote(f"{url}/tagged", token=token)
        assert torch.equal(remote(numbered(3)), Tagged()(numbered(3)).double())
        if token:
            with pytest.raises(RemoteError, match="401"):
                Remote(f"{url}/tagged", token="wrong")


def test_the_application_of_the_replicas_example():
    """What examples/reward_replicas.py starts in each replica; Ray Serve itself is not run here."""
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "reward_replicas.py"))
    images = numbered(3)
    with own_server(example["application"](["ink"], token="secret", batch=8)()) as url:
        expected = rewards.Ink()(images).double()
        torch.testing.assert_close(Remote(url, token="secret")(images), expected)
    with own_server(example["application"](["light=ink", "dark=ink:-1"], token="secret", batch=8)()) as url:
        torch.testing.assert_close(Remote(f"{url}/dark", token="secret")(images), -expected)
