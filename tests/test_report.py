import json
import re
from html.parser import HTMLParser

import pytest
import torch

import steer
from steer.page import number, with_error
from steer.report import shown, summary, write_comparison, write_report


def score(x):
    return -(x - 1.0).square().flatten(1).sum(1)


def plane(dim=2):
    return steer.models.gaussian_mixture([[0.0] * dim, [3.0] * dim], [0.1, 0.2], steps=6)


def pictures():
    return steer.from_denoiser(
        lambda x, t: 0.5 * x, steer.VP(), 5, event=(1, 8, 8), decoder=lambda x: (x / 2.0 + 0.5).clamp(0.0, 1.0)
    )


class Links(HTMLParser):
    """Collects what a page asks a browser to fetch or to run, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.fetched, self.scripts, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.fetched += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        assert not any(name.startswith("on") for name in given)
        if tag == "script":
            self.scripts.append(given.get("type"))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    links = Links()
    links.feed(page)
    assert links.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.fetched)
    assert links.scripts == ["application/json"]
    assert page.count("<style") == 1  # one inside a figure would apply to the whole page
    assert not re.search(r"@import|url\((?!#)", page)
    return links


def numbers_in(page):
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("method", ["smc", "rollout"])
def test_report_of_pictures_is_self_contained_and_shows_every_picture(tmp_path, method):
    result = steer.sample(pictures(), score, method=method, particles=9, key=1)
    reference = steer.rollout(pictures(), score, particles=12, key=1)
    page = write_report(result, tmp_path, reference=reference, metrics={"ink": lambda x: x.mean((1, 2, 3))}, count=4)
    page = page.read_text()
    links = check(page)
    assert sum(link.startswith("data:image") for link in links.fetched) == 8
    assert page.count("<svg") == (4 if method == "smc" else 2)
    numbers = numbers_in(page)
    assert numbers["cost"]["nfe"] == 45
    assert numbers["reference_cost"]["nfe"] == 60
    assert numbers["reward"]["unsteered"] == pytest.approx(reference.reward.mean().item())
    ink = result.mean(lambda x: pictures().decode(x[None]).mean((1, 2, 3))).item()
    assert numbers["metrics"]["ink"]["steered"] == pytest.approx(ink, rel=1e-5)


@pytest.mark.parametrize(("dim", "plots"), [(1, 5), (2, 5), (4, 7)])
def test_report_of_other_samples(tmp_path, dim, plots):
    result = steer.smc(plane(dim), score, particles=8, batch=2)
    page = (result.report(tmp_path)).read_text()
    check(page)
    assert page.count("<svg") == plots
    assert "unsteered" not in numbers_in(page)["reward"]


def test_no_string_of_the_user_becomes_markup(tmp_path):
    evil = '<script>alert("&")</script>$\\frac$'
    result = steer.smc(plane(), score, particles=8)
    about = {"reward": evil, evil: "x", "command": evil}
    page = write_report(result, tmp_path, metrics={evil: lambda x: x[:, 0]}, title=evil, about=about).read_text()
    check(page)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)" in page
    assert numbers_in(page)["about"]["reward"] == evil


def test_forbidden_and_constant_rewards_do_not_break_the_figures(tmp_path):
    for i, reward in enumerate([lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), lambda x: torch.zeros(len(x))]):
        result = steer.importance_sampling(plane(), reward, particles=16)
        check(result.report(tmp_path / str(i), reference=steer.rollout(plane(), reward, particles=8)).read_text())


def test_interrupted_runs_say_so(tmp_path):
    def stop(state):
        if state.k == 3:
            raise steer.Stop

    result = steer.smc(pictures(), score, particles=4, on_step=stop)
    page = result.report(tmp_path).read_text()
    assert "Stopped early" in page
    assert summary(result)["interrupted"] is True


def test_shown_samples_follow_the_weights_best_first():
    result = steer.smc(plane(), score, particles=32)
    index = shown(result, 8, key=3)
    rewards = result.take(index).reward[0]
    assert torch.equal(rewards, rewards.sort(descending=True).values)
    assert sorted(index[0].tolist()) == sorted(
        steer.systematic(result.log_weight, steer.Key(3).fold("draw"), 8)[0].tolist()
    )


def test_comparison_report(tmp_path):
    def other(process, reward, **options):
        return steer.smc(process, reward, **options)

    comparison = steer.compare(
        plane(),
        score,
        methods=["importance_sampling", other],
        budget=48,
        keys=2,
        metrics={'<x" onload="alert(1)': lambda x: x[:, 0]},
    )
    page = write_comparison(comparison, tmp_path).read_text()
    check(page)
    assert [row["method"] for row in numbers_in(page)["rows"]] == [
        "rollout",
        "best_of_n",
        "importance_sampling",
        "other",
    ]
    assert page.count("<svg") == 3
    row = comparison.rows[2]
    assert with_error(*row.reward) in page


def test_numbers_as_text():
    assert [number(v) for v in (None, float("nan"), -0.01234, 12345.6)] == ["–", "–", "−0.0123", "12,346"]
    assert with_error(-5.0634, 0.1824) == "−5.06 ± 0.18"
    assert with_error(0.73149, 0.0321) == "0.731 ± 0.032"
    assert with_error(2.0, float("nan")) == with_error(2.0, None) == "2"
