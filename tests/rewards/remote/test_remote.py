"""A reward over the network: scores are neither lost nor swapped, and everything that goes wrong has a name."""

from __future__ import annotations

import json
import pickle
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from remote_rewards import Tagged, connect, numbered

import steer
import steer.rewards.remote.http_request
from steer.errors import NotDifferentiableError, RemoteError, RewardError, ShapeError
from steer.rewards.pil_images import from_png, to_pictures, to_png
from steer.rewards.remote.client import Remote
from steer.rewards.remote.server import serve
from steer.rewards.remote.wire_format import PROTOCOL, decode_samples, encode_parts, encode_request, read_request
from steer.types import RewardSpec

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


@pytest.mark.slow
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


# -- refusals


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


@pytest.mark.slow
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
