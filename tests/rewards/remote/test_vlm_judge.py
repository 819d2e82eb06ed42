"""A judge behind a loopback endpoint: what it is sent, how its answers are read, what a failure is."""

from __future__ import annotations

import base64
import inspect
import json
import logging
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from steer.errors import RewardError
from steer.rewards.pil_images import from_png
from steer.rewards.remote.vlm_judge import VLMJudge, read_json, read_line


@contextmanager
def endpoint(answer):
    """A chat endpoint that answers `answer(request, headers)`: a text, or (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = answer(asked | {"path": self.path}, self.headers)
            status, body = said if isinstance(said, tuple) else (200, completion(said))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def completion(said: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()


def seen(asked) -> torch.Tensor:
    """The image of a request."""
    url = asked["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return from_png(base64.b64decode(url.partition(",")[2]))


IMAGES = (torch.arange(11) / 255).view(11, 1, 1, 1).expand(11, 3, 2, 2)


def test_scores_are_the_judges_in_order():
    """It sees the very pixels, and answers with the level of the first one."""
    with endpoint(lambda asked, _: f"I see.\n**Score: {round(float(seen(asked)[0, 0, 0]) * 255)}/10**") as url:
        scores = VLMJudge(url, "m", token_env=None)(IMAGES, prompts=["a"] * 11)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([level / 10 for level in range(11)])


def test_the_request_is_a_chat_completion(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "key")
    asked = []
    with endpoint(lambda request, headers: asked.append((request, headers["Authorization"])) or '{"score": 3}') as url:
        judge = VLMJudge(url + "/", "m", answer="json", scale=4, token_env="JUDGE_KEY", options={"max_tokens": 9})
        assert judge(IMAGES[:1], prompts=['a {form} "quoted" {cat}']).item() == 0.75
    ((request, token),) = asked
    assert token == "Bearer key"
    assert (request["path"], request["model"], request["max_tokens"]) == ("/v1/chat/completions", "m", 9)
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["score"]
    text = request["messages"][0]["content"][1]["text"]
    assert 'Text: a {form} "quoted" {cat}\n' in text  # the prompt is not a template
    assert 'Answer with the JSON object {"score": k}, k from 0 to 4.' in text
    assert "key" not in repr(judge)


def test_a_rubric_of_its_own_may_need_no_prompts():
    assert "prompts" in inspect.signature(VLMJudge("http://x", "m")).parameters
    judge = VLMJudge("http://x", "m", rubric="Is it pretty? {form}")
    assert "prompts" not in inspect.signature(judge).parameters
    assert judge.spec.gradient == "none"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Score: 7/10", 7.0),
        ("fine\nscore: 7.5 / 10.\n", 7.5),
        ("**Score:** 7/10", 7.0),
        ("**Score**: 0/10", 0.0),
        ("Score: **8**/10", 8.0),
        ("**Final Score: 8/10**", 8.0),
        ("Score: 8 out of 10", 8.0),
        ("8/10", 8.0),
        ("Score：８/10", 8.0),  # full-width
        ("| Score: .5/10 |", 0.5),
        ("# Score: 8/10", 8.0),
        ("- Score: 8/10", 8.0),
        ("> `Score: 8/10`", 8.0),
        (r"\boxed{Score: 8/10}", 8.0),
        ("Score: 8/10\r\n\r\nLet me know!", 8.0),
        ("Score: 8/10\nI checked twice.\n**Score: 8/10**", 8.0),
        ("<think>maybe Score: 3/10</think>\nScore: 8/10", 8.0),
        ("so\nScore: 3/10\n</think>\nScore: 8/10", 8.0),
        ("<think>\nScore: 3/10\nbut", None),  # cut off
        ("the image has 8/10 balloons", None),
        ("Score: 7", None),
        ("Score: 7/5", None),
        ("Score: 11/10", None),
        ("Score: -3/10", None),
        ("Score: 7/10\nScore: 8/10", None),
        ("I would say a score: 7/10 is right", None),
        ("Score: seven/10", None),
        ("Score: 7/100", None),
        ("", None),
    ],
)
def test_lines_are_read_strictly(said: str, score):
    assert read_line(said, 10) == score


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"score": 7}', 7.0),
        (' {"score": 7.5}\n', 7.5),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": 7, "why": ""}', 7.0),
        ('```json\n{"score": 7}\n```', 7.0),
        ('Here it is:\n```\n{"score": 7}\n```\nAnything else?', 7.0),
        ('<think>{"score": 3}</think>{"score": 7}', 7.0),
        ('```json\n{"score": 7}\n```\n```json\n{"score": 8}\n```', None),
        ('{"score": 7, "score": 8}', None),
        ('{"result": {"score": 7}}', None),
        ("[]", None),
        ("[7]", None),
        ("7", None),
    ],
)
def test_json_is_read_strictly(said: str, score):
    assert read_json(said, 10) == score


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, completion(7)), "expected an answer in words"),
        ((200, b"{}"), "expected a chat completion"),
        ((200, b"<html>"), "expected a chat completion"),
        ((401, b'{"error": "bad key"}'), "answered 401.*bad key"),
        ((400, b"no such model"), "answered 400.*no such model"),
    ],
)
def test_a_failure_is_not_a_score(answer, said: str):
    with endpoint(lambda *_: answer) as url, pytest.raises(RewardError, match=said):
        VLMJudge(url, "m", token_env=None)(IMAGES[:1], prompts=["a"])


def test_one_unreadable_reply_is_a_failure_of_its_sample(caplog):
    def first_fails(asked, _):
        return "I cannot judge this." if float(seen(asked)[0, 0, 0]) == 0 else "Score: 4/10"

    with endpoint(first_fails) as url, caplog.at_level(logging.WARNING, "steer"):
        scores = VLMJudge(url, "m", token_env=None)(IMAGES[:3], prompts=["a"] * 3)
        assert scores.tolist() == pytest.approx([-torch.inf, 0.4, 0.4])
        assert "gets -inf; it said 'I cannot judge this.'" in caplog.text
        half = VLMJudge(url, "m", token_env=None, unreadable=0.5)(IMAGES[:2], prompts=["a"] * 2)
        assert half.tolist() == pytest.approx([0.5, 0.4])
        with pytest.raises(RewardError, match=r"must answer with one line.*got 'I cannot judge this\.';"):
            VLMJudge(url, "m", token_env=None, unreadable=None)(IMAGES[:3], prompts=["a"] * 3)
        with pytest.raises(
            RewardError, match=r"got 'I cannot judge this\.', and 1 more without"
        ):  # rubric or endpoint are wrong
            VLMJudge(url, "m", token_env=None)(IMAGES[:1].expand(2, -1, -1, -1), prompts=["a"] * 2)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_a_busy_endpoint_is_asked_again(status: int):
    answers = iter([(status, b"busy"), "Score: 4/10"])
    with endpoint(lambda *_: next(answers)) as url:
        assert VLMJudge(url, "m", token_env=None)(IMAGES[:1], prompts=["a"]).item() == pytest.approx(0.4)


def test_a_refusal_is_a_failure_of_its_sample():
    with endpoint(lambda *_: (200, completion(None))) as url:
        assert VLMJudge(url, "m", token_env=None)(IMAGES[:1], prompts=["a"]).item() == -torch.inf


def test_an_answer_in_parts_is_read():
    parts = [{"type": "text", "text": "Score: "}, {"type": "text", "text": "4/10"}]
    with endpoint(lambda *_: (200, completion(parts))) as url:
        assert VLMJudge(url, "m", token_env=None)(IMAGES[:1], prompts=["a"]).item() == pytest.approx(0.4)


def test_it_is_asked_again_only_as_often_as_allowed():
    answers = iter([(429, b""), "hm", "Score: 4/10", "hm", "hm"])
    with endpoint(lambda *_: next(answers)) as url:
        judge = VLMJudge(url, "m", token_env=None, asks=2, unreadable=None)
        assert judge(IMAGES[:1], prompts=["a"]).item() == pytest.approx(0.4)
        with pytest.raises(RewardError, match="got 'hm'"):
            judge(IMAGES[:1], prompts=["a"])
        assert next(answers, None) is None


def test_a_missing_key_or_prompt_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RewardError, match=r"OPENAI_API_KEY, which is not set.*token_env=None"):
        VLMJudge("http://127.0.0.1:9", "m")(IMAGES[:1], prompts=["a"])
    with pytest.raises(RewardError, match="needs the prompts"):
        VLMJudge("http://127.0.0.1:9", "m")(IMAGES[:1])
    with pytest.raises(RewardError, match="needs 1 prompts"):
        VLMJudge("http://127.0.0.1:9", "m")(IMAGES[:1], prompts=["a", "b"])
    for wrong in ({"url": "file:///x"}, {"answer": "xml"}, {"scale": 0}, {"unreadable": 2.0}):
        with pytest.raises(RewardError, match="VLMJudge"):
            VLMJudge(**{"url": "http://x", "model": "m"} | wrong)
