"""Every Python snippet of the README and the documentation runs, page by page, as a reader would paste it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch

import steer
from steer import grpo, rewards, search

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {  # run by tests of their own
    "extending.md": "tests/test_extending.py",
}
SMALLER = (  # the same calls on fewer samples: what a snippet says is that it runs, not what comes out
    (r"steps=(20|30|50)\b", "steps=4"),
    (r"budget=\d+", "budget=96"),
    (r"particles=(24|64|256|500|512)\b", "particles=8"),
    (r"keys=\d+", "keys=2"),
    (r"samples=16", "samples=4"),
    (r"groups=4, group_size=24", "groups=1, group_size=4"),
    (r"group_size=(16|24)", "group_size=4"),
    (r"first_half\(2\)", "first_half(1)"),
)


def pages_with_snippets():
    return [page for page in PAGES if FENCE.search(page.read_text()) and page.name not in ELSEWHERE]


def snippets(page: Path) -> list[str]:
    return [match[3] for match in FENCE.finditer(page.read_text())]


class Writer:
    """Stands for TensorBoard's, which the tests do not need."""

    def __init__(self, folder):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, *_, **__):
        pass


def shown(*what) -> str:
    """Stands for the pictures of the site."""
    return "a picture"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take for granted: a process, a reward, a pipeline, and packages of others."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipelines.sd15()
    opened = diffusers.DiffusionPipeline.from_pretrained.__func__
    hub = lambda cls, name, **options: pipe if str(name).startswith("stable-") else opened(cls, name, **options)  # noqa: E731
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(hub))
    monkeypatch.setattr(rewards, "CLIPScore", lambda **_: rewards.JPEGSize())
    opened_by_name = lambda name, *, revision, **options: steer.from_pipeline(pipe, **options)  # noqa: E731
    monkeypatch.setattr(steer, "from_hub", opened_by_name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    alone = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    begin = torch.distributed.init_process_group
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _: begin("gloo", **alone))
    monkeypatch.setitem(sys.modules, "docs_pictures", types.SimpleNamespace(grid=shown, tree=shown, scatter=shown))
    ink = rewards.Ink()
    one = torch.ones(1, 3)  # for each problem
    found = {
        "__name__": "snippet",
        "steer": steer, "rewards": rewards, "search": search, "grpo": grpo, "torch": torch,
        "process": steer.load("digits", steps=4), "reward": ink, "my_reward": ink, "pipe": pipe,
        "prompts": ["a fox", "a cat"], "step": 0, "update": 0,
        "log_likelihood": lambda x: -x.square().flatten(1).sum(1),
        "classifier": lambda x, t: x.flatten(1)[:, :2], "features": lambda x: x.flatten(1),
        "real": torch.rand(32, 1, 8, 8),
        "ids": one, "embeds": one, "mask": one,
        "cond": dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "prompt_ids"), one),
        "samples": {}, "DataProto": lambda *_: None, "TensorDict": lambda *_, **__: None,
    }  # fmt: skip
    yield found
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(page: Path, names: dict) -> None:
    for number, snippet in enumerate(snippets(page)):
        for pattern, smaller in SMALLER:
            snippet = re.sub(pattern, smaller, snippet)
        exec(compile(snippet, f"{page.name}, snippet {number + 1}", "exec"), names)


def test_a_snippet_that_fails_is_found(tmp_path, names):
    (tmp_path / "page.md").write_text("```python\nsteer.sample(process, reward, budgt=96)\n```\n")
    with pytest.raises(TypeError, match="budgt"):
        run(tmp_path / "page.md", names)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_snippets(), ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(page, names):
    if page.name == "exporters.md":  # trainers score the steps of flows
        names["process"] = steer.load("digits-flow", steps=4, transition=steer.flow_sde(0.7))
    run(page, names)
