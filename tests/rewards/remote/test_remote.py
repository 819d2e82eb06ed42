"""A reward over the network: scores are neither lost nor swapped, and everything that goes wrong has a name."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import pickle
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import steer
import steer.rewards.remote.http_request
from steer import rewards
from steer.errors import NotDifferentiableError, RemoteError, RewardError, ShapeError
from steer.rewards.pil_images import from_png, to_pictures, to_png
from steer.rewards.remote.client import Remote
from steer.rewards.remote.scoring_queue import Memory
from steer.rewards.remote.server import serve
from steer.rewards.remote.wire_format import PROTOCOL, decode_samples, encode_parts, encode_request, read_request
from steer.types import RewardSpec


class Tagged:
    """The first pixel in 255ths, plus 1000 times the length of the prompt."""

    spec = RewardSpec(unit="nat", bounds=(0.0, float("inf")), gradient="exact", prompts=True, version="v1")
    __name__ = "Tagged"

    def __call__(self, samples, *, prompts=None):
        scores = samples[:, 0, 0, 0] * 255
        return scores if prompts is None else scores + 1000 * torch.tensor([float(len(text)) for text in prompts])


def connect(server, **options) -> Remote:
    return Remote(server.url, **{"token": server.token, **options})


def numbered(rows: int, first: int = 0) -> torch.Tensor:
    images = torch.zeros(rows, 3, 4, 5)
    images[:, 0, 0, 0] = ((torch.arange(rows) + first) % 256) / 255
    return images


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rewards.remote.http_request, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rewards.remote.http_request, "LONGEST_WAIT", 0.1)


# -- the way there and back


def test_images_pass_png_unchanged():
    levels = torch.randint(0, 256, (4, 3, 7, 9), generator=torch.Generator().manual_seed(0))
    for images in (levels / 255, levels[:, :1] / 255):
        assert torch.equal(torch.stack([from_png(to_png(p)) for p in to_pictures(images, "it")]), images.float())


def test_floats_and_tokens_pass_safetensors_unchanged():
    generator = torch.Generator().manual_seed(0)
    doubles = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    for samples in (doubles, torch.arange(12).view(3, 4), doubles.bfloat16()):
        body = encode_request(encode_parts(samples, "tensor", "it"), ["a", "b", "c"], "tensor")
        request = read_request(body, 1000)
        came, prompts = decode_samples(request, 1000), request.prompts
        assert came.dtype == samples.dtype
        assert torch.equal(came, samples)
        assert prompts == ["a", "b", "c"]


def test_scores_are_those_of_the_reward_in_order():
    images, prompts = numbered(50), ["é" * (row % 7) for row in range(50)]
    with serve(Tagged()) as server:
        remote = connect(server, batch=7)
        assert torch.equal(remote(images, prompts=prompts), Tagged()(images, prompts=prompts).double())
        assert torch.equal(remote(images), Tagged()(images).double())
        assert remote(images[:0]).shape == (0,)
        assert remote.spec == RewardSpec("nat", (0.0, float("inf")), "none", "pointwise", True, "v1")
        with pytest.raises(NotDifferentiableError, match=r"Remote\(Tagged\) has no gradient"):
            remote(images.requires_grad_())


def test_minus_infinity_passes_and_nan_is_an_error():
    with serve(lambda samples: samples[:, 0, 0, 0].log()) as server:
        scores = connect(server)(numbered(2))
        assert scores[0] == -torch.inf
        assert torch.equal(scores[1:], torch.tensor([1 / 255]).log().double())
    with (
        serve(lambda samples: samples[:, 0, 0, 0] * torch.tensor([1.0, float("nan")])) as server,
        pytest.raises(RewardError, match=r"gave NaN for 1 of 2 samples \(first: row 1"),
    ):
        connect(server)(numbered(2))


def test_prompts_are_asked_for_only_where_they_are_read():
    import inspect

    with serve(Tagged()) as wants, serve(lambda samples: samples.mean((1, 2, 3))) as plain:
        assert "prompts" in inspect.signature(connect(wants)).parameters
        assert "prompts" not in inspect.signature(connect(plain)).parameters


def test_samplers_follow_a_remote_reward():
    process = steer.load("letters")
    with serve(lambda samples: (samples == 4).double().sum(1)) as server:
        remote = connect(server, encoding="tensor")
        near = steer.smc(process, lambda samples: (samples == 4).double().sum(1), particles=4, key=0)
        assert torch.equal(steer.smc(process, remote, particles=4, key=0).x, near.x)


def test_large_batches_are_split_to_what_the_server_reads():
    noise = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    noise[:, 0, 0, 0] = torch.arange(12) / 255
    with serve(Tagged(), max_pixels=5 * 3 * 32 * 32) as server:
        assert connect(server, batch=64)(noise).tolist() == pytest.approx(list(range(12)))
        with pytest.raises(RewardError, match=r"15360 pixels per request, and sample 0 alone has .* and 30000;"):
            connect(server)(torch.zeros(1, 3, 100, 100))
    with serve(Tagged(), max_bytes=12_000) as server:
        assert connect(server, batch=64)(noise).tolist() == pytest.approx(list(range(12)))
        with pytest.raises(RewardError, match=r"at most 12000 bytes and .* per request, and sample 0 alone has"):
            connect(server)(torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(0)))


def test_a_groupwise_reward_sees_its_whole_group():
    class Ranked:
        spec = RewardSpec(scope="groupwise")

        def __call__(self, samples):
            return samples[:, 0, 0, 0].argsort().argsort()

    images = numbered(20).flip(0)
    with serve(Ranked(), max_pixels=20 * 60) as server:
        remote = connect(server, batch=3)
        assert torch.equal(remote(images), torch.arange(20.0, dtype=torch.float64).flip(0))
        with pytest.raises(RewardError, match="must fit in one request, and 21 do not"):
            remote(numbered(21))


# -- under load


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
        go.wait(5)
        return samples.mean((1, 2, 3))

    with serve(slow) as server:
        with pytest.raises(RemoteError, match="gave no answer"):  # one is being scored, five wait
            connect(server, timeout=0.3, batch=1, parallel=6)(numbered(6))
        time.sleep(0.3)
        go.set()
        assert connect(server)(numbered(2)).shape == (2,)
    assert scored == [1, 2]


def test_decoding_waits_for_memory(monkeypatch):
    """Eight threads, and memory for two requests of the largest size."""
    most = 300_000
    under_way, peak, lock = [0], [0], threading.Lock()
    decode = rewards.remote.web_app.decode_samples

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

    monkeypatch.setattr(rewards.remote.web_app, "decode_samples", counted)
    images = torch.zeros(8, 3, 310, 310)
    with serve(reward, threads=8, max_pixels=most, max_bytes=10_000, memory=2 * 8 * most + 100_000) as server:
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


# -- refusals of the server


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


# -- refusals of the client


@contextmanager
def fake(reply):
    """A server that describes itself well and answers scores by `reply(handler)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = {"unit": None, "bounds": ["-inf", "inf"], "version": "1"}
            self.send(
                json.dumps({"protocol": PROTOCOL, "name": "fake", "spec": said, "limits": [1 << 20, 1 << 20]}).encode()
            )

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            reply(self)

        def send(self, body: bytes, status: int = 200, **headers: str):
            self.send_response(status)
            for key, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def scores(*values, name="fake", version="1"):
    return json.dumps({"name": name, "version": version, "scores": list(values)}).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (scores(1.0), "must return 2 scores, one per sample, got 1"),
        (scores(1.0, 2.0, 3.0), "got 3"),
        (scores(1.0, None), "gave NaN for 1 of 2"),
        (scores(1.0, "2"), "must return numbers, got '2'"),
        (scores(1.0, True), "must return numbers, got True"),
        (scores(1.0, 10**400), "must return numbers"),
        (b'{"name": "fake", "version": "1", "scores": [NaN, 1]}', "to be JSON"),
        (scores(1.0, 2.0, name="other"), r"was fake \(version 1\).*is other"),
        (b"<html>", "to be JSON, got b'<html>'"),
        (b"[]", "JSON object"),
        (b"x" * 10_000, "longer than the"),
        (pickle.dumps([1.0, 2.0]), "to be JSON"),
    ],
)
def test_wrong_replies_are_named(body: bytes, said: str):
    with fake(lambda handler: handler.send(body)) as url, pytest.raises(RewardError, match=said):
        Remote(url)(numbered(2))


SLOW = {
    "silent": [b""],
    "status line": [b"HTTP/1.1 ", *[b"2"] * 30],
    "header": [b"HTTP/1.1 200 OK\r\n", *[b"X: a\r\n"] * 30],
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 30],
    "error": [b"HTTP/1.1 400 Bad\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 30],
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW)
def test_slow_replies_run_into_the_deadline(pieces):
    """Each piece comes well within the timeout; the whole takes ten times as long."""

    def trickling(handler):
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.1)
        time.sleep(0.2)

    with fake(trickling) as url:
        remote, began = Remote(url, timeout=0.2), time.monotonic()
        with pytest.raises(RemoteError, match=r"gave no answer within 0\.2 s"):
            remote(numbered(1))
        assert time.monotonic() - began < 1.5


def test_blanks_prolong_a_request_as_long_as_it_may_queue():
    def waiting(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(8):
            handler.wfile.write(b" ")
            time.sleep(0.1)
        handler.wfile.write(scores(1.0))

    with fake(waiting) as url:
        assert Remote(url, timeout=0.3)(numbered(1)).item() == 1.0
        with pytest.raises(RemoteError, match=r"gave no answer within 0\.3 s, after 0\.\d+ s in its queue"):
            Remote(url, timeout=0.3, queue_timeout=0.1)(numbered(1))


def test_a_cut_reply_is_asked_for_again_and_redirects_are_not_followed():
    tries = []

    def cut(handler):
        tries.append(1)
        if len(tries) < 3:
            handler.send(scores(1.0)[:-5], Content_Length="500")
        else:
            handler.send(scores(1.0))

    with fake(cut) as url:
        assert Remote(url)(numbered(1)).item() == 1.0
    with (
        fake(lambda handler: handler.send(b"", 302, Location="http://127.0.0.1:9/")) as url,
        pytest.raises(RewardError, match="answered 302"),
    ):
        Remote(url, token="secret")(numbered(1))


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 529])
def test_a_proxy_without_an_answer_is_asked_again(status: int):
    tries = []

    def restarting(handler):
        tries.append(1)
        handler.send(b"bad gateway", status) if len(tries) < 3 else handler.send(scores(1.0))

    with fake(restarting) as url:
        assert Remote(url)(numbered(1)).item() == 1.0
    assert len(tries) == 3


def test_only_what_may_pass_is_repeated():
    tries = []

    def failing(handler):
        tries.append(1)
        handler.send(b"", 500)

    with fake(failing) as url, pytest.raises(RewardError, match="answered 500"):
        Remote(url)(numbered(1))
    assert len(tries) == 1
    with pytest.raises(RewardError, match=r"cannot be reached at http://127.0.0.1:9/spec.*\(tried 3 times\)"):
        Remote("http://127.0.0.1:9", retries=2)


def test_what_is_not_a_reward_server_is_noticed_at_once():
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.raises(RewardError, match="answered 501"):
        Remote(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:80", "ftp://x", "file:///etc/passwd", "http://", "http://:80", "http://a b", "http://[::1",
        "http://[::1]:x", "http://127.0.0.1:99999", "http://127.0.0.1:1/\r\nX: y", "http://127.0.0.1:1/?q=1",
        "http://user:pw@127.0.0.1:1",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_named(url: str):
    with pytest.raises(RewardError, match=r"Remote\(url\) (needs http|takes no user)"):
        Remote(url)


@pytest.mark.parametrize("length", ["abc", "-1", "99999999999999999999999"])
def test_a_content_length_that_is_none_is_named(length: str):
    with fake(lambda handler: handler.send(b"{}", Content_Length=length)) as url, pytest.raises(RemoteError):
        Remote(url, retries=0)(numbered(1))


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    for package, call in (("httpx", lambda: Remote("http://127.0.0.1:9")), ("uvicorn", lambda: serve(Tagged()))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(RewardError, match=rf"package {package}.*pip install 'steer-diffusion\[serve\]'"):
                call()


def test_images_outside_their_range_are_not_sent():
    with serve(Tagged()) as server:
        remote = connect(server)
        for value in (1.5, -0.1, float("nan")):
            with pytest.raises(RewardError, match=r"needs images in \[0, 1\]"):
                remote(torch.full((1, 3, 2, 2), value))
        with pytest.raises(ShapeError, match="reads images"):
            remote(torch.zeros(2, 5))
        with pytest.raises(RewardError, match="needs 2 prompts"):
            remote(numbered(2), prompts=["a"])
