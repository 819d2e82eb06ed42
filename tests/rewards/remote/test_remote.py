"""A reward over the network: scores are neither lost nor swapped, and everything that goes wrong has a name."""

from __future__ import annotations

import http.client
import io
import json
import pickle
import socket
import struct
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
from steer.errors import NotDifferentiableError, RewardError, ShapeError
from steer.rewards.pil_images import from_png, to_pictures, to_png
from steer.rewards.remote.client import Remote
from steer.rewards.remote.server import serve
from steer.rewards.remote.wire_format import decode_request, encode_parts, encode_request
from steer.types import RewardSpec


class Tagged:
    """The first pixel in 255ths, plus 1000 times the length of the prompt."""

    spec = RewardSpec(unit="nat", bounds=(0.0, float("inf")), gradient="exact", prompts=True, version="v1")
    __name__ = "Tagged"

    def __call__(self, samples, *, prompts=None):
        scores = samples[:, 0, 0, 0] * 255
        return scores if prompts is None else scores + 1000 * torch.tensor([float(len(text)) for text in prompts])


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
        came, prompts = decode_request(body, 1000)
        assert came.dtype == samples.dtype
        assert torch.equal(came, samples)
        assert prompts == ["a", "b", "c"]


def test_scores_are_those_of_the_reward_in_order():
    images, prompts = numbered(50), ["é" * (row % 7) for row in range(50)]
    with serve(Tagged()) as server:
        remote = Remote(server.url, batch=7)
        assert torch.equal(remote(images, prompts=prompts), Tagged()(images, prompts=prompts).double())
        assert torch.equal(remote(images), Tagged()(images).double())
        assert remote(images[:0]).shape == (0,)
        assert remote.spec == RewardSpec("nat", (0.0, float("inf")), "none", "pointwise", True, "v1")
        with pytest.raises(NotDifferentiableError, match=r"Remote\(Tagged\) has no gradient"):
            remote(images.requires_grad_())


def test_minus_infinity_passes_and_nan_is_an_error():
    with serve(lambda samples: samples[:, 0, 0, 0].log()) as server:
        scores = Remote(server.url)(numbered(2))
        assert scores[0] == -torch.inf
        assert torch.equal(scores[1:], torch.tensor([1 / 255]).log().double())
    with (
        serve(lambda samples: samples[:, 0, 0, 0] * torch.tensor([1.0, float("nan")])) as server,
        pytest.raises(RewardError, match=r"gave NaN for 1 of 2 samples \(first: row 1"),
    ):
        Remote(server.url)(numbered(2))


def test_prompts_are_asked_for_only_where_they_are_read():
    import inspect

    with serve(Tagged()) as wants, serve(lambda samples: samples.mean((1, 2, 3))) as plain:
        assert "prompts" in inspect.signature(Remote(wants.url)).parameters
        assert "prompts" not in inspect.signature(Remote(plain.url)).parameters


def test_samplers_follow_a_remote_reward():
    process = steer.load("letters")
    with serve(lambda samples: (samples == 4).double().sum(1)) as server:
        remote = Remote(server.url, encoding="tensor")
        near = steer.smc(process, lambda samples: (samples == 4).double().sum(1), particles=4, key=0)
        assert torch.equal(steer.smc(process, remote, particles=4, key=0).x, near.x)


def test_large_batches_are_split_to_what_the_server_reads():
    noise = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    noise[:, 0, 0, 0] = torch.arange(12) / 255
    with serve(Tagged(), max_pixels=5 * 3 * 32 * 32) as server:
        assert Remote(server.url, batch=64)(noise).tolist() == pytest.approx(list(range(12)))
        with pytest.raises(RewardError, match=r"15360 pixels per request, and sample 0 alone has .* and 30000;"):
            Remote(server.url)(torch.zeros(1, 3, 100, 100))
    with serve(Tagged(), max_bytes=12_000) as server:
        assert Remote(server.url, batch=64)(noise).tolist() == pytest.approx(list(range(12)))
        with pytest.raises(RewardError, match=r"at most 12000 bytes and .* per request, and sample 0 alone has"):
            Remote(server.url)(torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(0)))


def test_a_groupwise_reward_sees_its_whole_group():
    class Ranked:
        spec = RewardSpec(scope="groupwise")

        def __call__(self, samples):
            return samples[:, 0, 0, 0].argsort().argsort()

    images = numbered(20).flip(0)
    with serve(Ranked(), max_pixels=20 * 60) as server:
        remote = Remote(server.url, batch=3)
        assert torch.equal(remote(images), torch.arange(20.0, dtype=torch.float64).flip(0))
        with pytest.raises(RewardError, match="must fit in one request, and 21 do not"):
            remote(numbered(21))


# -- under load


def test_two_hundred_at_once_lose_and_swap_nothing():
    """More clients than places: the rest hear 503 and come again."""
    refused = []
    with serve(Tagged(), queue=16) as server:
        slots = server.queue_places.acquire

        def acquire(blocking=True):
            got = slots(blocking=blocking)
            refused.append(not got)
            return got

        server.queue_places.acquire = acquire
        remote = Remote(server.url, retries=200, parallel=1)

        def ask(first: int) -> bool:
            images = numbered(3, first)
            return torch.equal(remote(images, prompts=["a" * first] * 3), Tagged()(images, prompts=["a" * first] * 3))

        with ThreadPoolExecutor(200) as pool:
            assert all(pool.map(ask, range(200)))
    assert len(refused) >= 200


def test_a_full_queue_is_503_and_reported_when_it_lasts():
    hold, entered = threading.Event(), threading.Event()

    def slow(samples):
        entered.set()
        hold.wait(10)
        return samples.mean((1, 2, 3))

    with serve(slow, queue=1) as server, ThreadPoolExecutor(1) as pool:
        remote = Remote(server.url, retries=2)
        first = pool.submit(remote, numbered(1))
        assert entered.wait(5)
        with pytest.raises(RewardError, match=r"answered 503.*queue.*\(tried 3 times\)"):
            remote(numbered(1))
        hold.set()
        assert first.result().shape == (1,)


def test_a_server_killed_and_restarted_in_the_middle_goes_unnoticed():
    calls = threading.Event()

    class Slow(Tagged):
        def __call__(self, samples, *, prompts=None):
            calls.set()
            time.sleep(0.005)
            return super().__call__(samples, prompts=prompts)

    server = serve(Slow())
    port = server.server_address[1]
    remote = Remote(server.url, batch=1, parallel=8, retries=100)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(remote, numbered(100))
        assert calls.wait(5)
        server.close()
        time.sleep(0.2)
        assert not answer.done()
        with serve(Slow(), port=port):
            assert answer.result(timeout=30).tolist() == list(range(100))


def test_another_version_after_a_restart_is_an_error():
    class Newer(Tagged):
        spec = RewardSpec(version="v2")

    server = serve(Tagged())
    remote = Remote(server.url)
    server.close()
    with (
        serve(Newer(), port=server.server_address[1]),
        pytest.raises(RewardError, match=r"was Tagged \(version v1\).*is Tagged \(version v2\) now"),
    ):
        remote(numbered(1))


# -- refusals of the server


def post(server, body: bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=5)
    connection.request("POST", "/score", body, headers)
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
        with socket.create_connection(server.server_address[:2], timeout=5) as raw:
            raw.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n")
            assert b" 413 " in raw.recv(200)
        with socket.create_connection(server.server_address[:2], timeout=5) as raw:
            raw.sendall(b"POST /score HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b" 411 " in raw.recv(200)


def test_a_wrong_token_is_refused():
    with serve(Tagged(), token="secret") as server:
        assert Remote(server.url, token="secret")(numbered(2)).tolist() == [0.0, 1.0]
        for token in (None, "Secret", "secrets", "secre"):
            with pytest.raises(RewardError, match="answered 401"):
                Remote(server.url, token=token)
        for token in ("secret\n", "sécret"):
            with pytest.raises(RewardError, match="not printable ASCII"):
                Remote(server.url, token=token)
        assert post(server, framed({"encoding": "png", "sizes": [len(PNG)]}, PNG))[0] == 401
        assert "secret" not in repr(Remote(server.url, token="secret"))


def test_other_machines_need_a_token():
    with pytest.raises(RewardError, match="can be reached from other machines and needs a token"):
        serve(Tagged(), host="0.0.0.0")
    serve(Tagged(), host="0.0.0.0", token="secret").close()


def test_what_the_reward_raises_reaches_the_client_by_name():
    def broken(samples):
        raise ZeroDivisionError("by zero")

    with serve(broken) as server, pytest.raises(RewardError, match=r"answered 500.*broken raised ZeroDivisionError"):
        Remote(server.url)(numbered(1))
    with serve(lambda samples: samples) as server, pytest.raises(RewardError, match=r"500.*one score per sample"):
        Remote(server.url)(numbered(1))


# -- refusals of the client


@contextmanager
def fake(reply):
    """A server that describes itself well and answers scores by `reply(handler)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            said = {"unit": None, "bounds": ["-inf", "inf"], "version": "1"}
            self.send(json.dumps({"protocol": 1, "name": "fake", "spec": said, "limits": [1 << 20, 1 << 20]}).encode())

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


def test_slow_replies_run_into_the_deadline():
    def silent(handler):
        time.sleep(5)

    def trickling(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    for reply in (silent, trickling):
        with fake(reply) as url:
            remote, began = Remote(url, timeout=0.3), time.monotonic()
            with pytest.raises(RewardError, match=r"gave no answer within 0\.3 s"):
                remote(numbered(1))
            assert time.monotonic() - began < 4


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
    for bad in ("localhost:80", "ftp://x", "file:///etc/passwd"):
        with pytest.raises(RewardError, match="needs http"):
            Remote(bad)


def test_images_outside_their_range_are_not_sent():
    with serve(Tagged()) as server:
        remote = Remote(server.url)
        for value in (1.5, -0.1, float("nan")):
            with pytest.raises(RewardError, match=r"needs images in \[0, 1\]"):
                remote(torch.full((1, 3, 2, 2), value))
        with pytest.raises(ShapeError, match="reads images"):
            remote(torch.zeros(2, 5))
        with pytest.raises(RewardError, match="needs 2 prompts"):
            remote(numbered(2), prompts=["a"])
