import base64
import copy
import dataclasses
import functools
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from markupsafe import escape
from PIL import Image

import steer
from steer import rewards, search
from steer.errors import ShapeError
from steer.report.best_chain import best_chain
from steer.report.comparison_report import write_comparison
from steer.report.page import number, with_error
from steer.report.plots import reward_course
from steer.report.run_report import shown, summary, write_report
from steer.report.tree_figure import tree_figure
from steer.report.tree_layout import chosen, leaf_weights


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


def check(page, scripts=("application/json",)):
    links = Links()
    links.feed(page)
    assert links.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.fetched)
    assert links.scripts == list(scripts)
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
    way = 6 if method == "rollout" else 0  # which keeps its states
    assert sum(link.startswith("data:image") for link in links.fetched) == 8 + way
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


class Tinted:
    """Pictures of two problems, each with a grey of its own; rows come problem by problem."""

    def __init__(self, greys=(0.0, 1.0)):
        self.greys, self.asked = greys, []

    def __call__(self, flat):
        grey = torch.tensor(self.greys).repeat_interleave(len(flat) // len(self.greys))
        assert len(grey) == len(flat)
        self.asked.append(self.greys)
        return grey[:, None, None, None].expand(-1, 1, 8, 8) + 0.0 * flat

    def only(self, problem):
        alone = Tinted((self.greys[problem],))
        alone.asked = self.asked
        return alone


class Halved:
    def __call__(self, x, t):
        return 0.5 * x

    def only(self, problem):
        return self


EVIL_PROMPT = "<b>a fox</b>"


@pytest.mark.parametrize("beside", [None, 1, 2])
def test_a_run_of_several_prompts_is_sectioned_by_them(tmp_path, beside):
    """Each prompt heads its own samples; the page names method, reward, unit, temperature and seed."""
    process = steer.from_denoiser(Halved(), steer.VP(), 3, event=(1, 8, 8), problems=2, decoder=Tinted())
    process = dataclasses.replace(process, prompts=(EVIL_PROMPT, "a car"))
    reward = rewards.Ink()
    result = steer.smc(process, reward, particles=4, temperature=0.25, seed=11)
    reference = None
    if beside is not None:
        reference = steer.rollout(process, reward, particles=4)
        reference = reference if beside == 2 else reference[1]
    page = result.report(tmp_path, reference=reference, count=3).read_text()
    check(page)
    numbers = numbers_in(page)
    assert [entry["prompt"] for entry in numbers["by_problem"]] == [EVIL_PROMPT, "a car"]
    assert [entry["reward"] for entry in numbers["by_problem"]] == pytest.approx(result.mean_reward.tolist())
    about = numbers["about"]
    assert {"method": "smc", "reward": "Ink", "temperature": 0.25, "seed": 11}.items() <= about.items()
    assert about["unit"] == reward.spec.unit
    first, second = page.index("&lt;b&gt;a fox&lt;/b&gt;</h3>"), page.index("a car</h3>")
    for start, end, grey in ((first, second, 0), (second, page.index("</section>", second), 255)):
        pictures = re.findall(r"base64,([^\"]+)", page[start:end])
        assert len(pictures) == (3 if beside is None else 6)
        steered = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures[-3:]]
        assert {image.getpixel((0, 0)) for image in steered} == {grey}


def test_unsteered_samples_of_other_problems_are_refused(tmp_path):
    result, other = (steer.smc(pictures(), score, particles=2, batch=batch) for batch in (3, 2))
    with pytest.raises(ShapeError, match="of 3 problems"):
        result.report(tmp_path, reference=other)


@pytest.mark.slow
@pytest.mark.parametrize("separable", [True, False])
def test_pictures_of_several_problems_are_decoded_by_their_own(tmp_path, separable):
    """Ways and trees show one problem's states at a time, in numbers that no other problem would share out."""
    decoder = Tinted()
    process = steer.from_denoiser(
        Halved() if separable else lambda x, t: 0.5 * x, steer.VP(), 5, event=(1, 8, 8), problems=2,
        decoder=decoder if separable else lambda x: (0.5 * x + 0.5).clamp(0.0, 1.0),
    )  # fmt: skip
    for i, method in enumerate((search.dts, search.dts_star, functools.partial(steer.smc, keep_states=True))):
        page = method(process, score, particles=5, key=2).report(tmp_path / str(i)).read_text()
        assert "How the best sample came about" in page
        assert ("<details" in page) == (i < 2)
    if separable:
        assert {(0.0,), (1.0,)} <= set(decoder.asked)


def test_no_string_of_the_user_becomes_markup(tmp_path):
    evil = '<script>alert("&")</script>$\\frac$'
    result = steer.smc(plane(), score, particles=8)
    about = {"reward": evil, evil: "x", "command": evil}
    page = write_report(result, tmp_path, metrics={evil: lambda x: x[:, 0]}, title=evil, about=about).read_text()
    check(page)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#34;&amp;&#34;)") >= 6  # title twice, three facts, tile; labels of plots
    assert numbers_in(page)["about"]["reward"] == evil


EVIL = "</title></script><script>alert('&')</script><img src=x onerror=alert(1)>"


def test_no_sample_that_is_text_becomes_markup(tmp_path):
    """Texts of samples stand in tables, in the strip of predictions, in tooltips of the tree, on cards."""
    process = steer.from_logits(
        lambda x, t: torch.zeros(*x.shape, 5), 3, length=4, vocabulary=5, text=lambda x: [EVIL] * len(x)
    )
    result = search.dts(process, many_e, budget=24, levels=2, key=1)
    page = result.report(tmp_path / "run", reference=steer.rollout(process, many_e, particles=3)).read_text()
    check(page, scripts=("application/json", None))
    assert page.count(str(escape(EVIL))) > len(result.reward[0])

    def evil(process, reward, **options):
        return steer.smc(process, reward, **options)

    evil.__name__ = name = "<script>1</script>"
    for model, least in ((process, 4), (pictures(), 3 + 16)):  # tables, card, alt texts; a plot has its own escapes
        comparison = steer.compare(model, many_e if model is process else score, methods=[evil], budget=80, keys=1)
        page = write_comparison(comparison, tmp_path).read_text()
        check(page)
        assert (str(escape(EVIL)) in page) == (model is process)
        assert page.count(str(escape(name))) >= least


@pytest.mark.parametrize("method", ["smc", "rollout", "importance_sampling", "svdd", "dts", "dts_star", "beam"])
def test_the_plot_of_the_reward_ends_where_the_headline_says(method):
    result = steer.sample(pictures(), score, method=method, budget=60, temperature=2.0, batch=2, key=3)
    course = reward_course(result)
    assert course.mean[-1] == pytest.approx(summary(result)["reward"]["steered"])
    assert course.best[-1] >= course.mean[-1] - 1e-9
    assert len(course.rows) == len(course.mean) == len(course.best)
    assert course.rows[-1] == result.cost.nfe
    assert course.rows == sorted(course.rows)


@pytest.mark.slow
def test_forbidden_and_constant_rewards_do_not_break_the_figures(tmp_path):
    for i, reward in enumerate([lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), lambda x: torch.zeros(len(x))]):
        result = steer.importance_sampling(plane(), reward, particles=16)
        check(result.report(tmp_path / str(i), reference=steer.rollout(plane(), reward, particles=8)).read_text())


def test_interrupted_runs_say_so(tmp_path):
    def stop(event):
        if event.level == 3:
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
    assert page.count("<svg") == 4  # a measure is drawn twice: its mean, and of the best
    row = comparison.rows[2]
    assert with_error(*row.reward) in page


def test_a_comparison_at_several_budgets_has_a_curve_and_a_table_per_measure(tmp_path):
    comparison = steer.compare(
        plane(), score, methods=["smc", "dts"], budget=[96, 24, 48], keys=3, metrics={"first": lambda x: x[:, 0]}
    )
    page = write_comparison(comparison, tmp_path).read_text()
    check(page)
    assert [stage["budget"] for stage in numbers_in(page)["budgets"]] == [24, 48, 96]
    assert page.count("<svg") == 4  # a measure is drawn twice: its mean, and of the best
    assert all(with_error(*row.best) in page for stage in comparison.at for row in stage.rows)


def test_a_comparison_writes_its_own_page(tmp_path):
    """As `result.report` does: with the samples of each method, and what the runs know of themselves."""
    comparison = steer.compare(pictures(), score, methods=["smc"], budget=20, keys=2, temperature=0.5, seed=7)
    page = comparison.report(tmp_path, count=2, title="A title").read_text()
    links = check(page)
    assert sum(link.startswith("data:image") for link in links.fetched) == 2 * 3  # of each method
    assert page.count("<figcaption>−") == 2 * 3  # with their rewards
    assert "<h1>A title</h1>" in page
    about = numbers_in(page)["about"]
    assert {"reward": "score", "temperature": 0.5, "seed": 7}.items() <= about.items()
    assert "method" not in about
    several = steer.compare(words(), many_e, methods=["smc"], budget=[8, 16], keys=2)
    page = several.report(tmp_path, count=2).read_text()
    check(page)
    assert [stage["budget"] for stage in numbers_in(page)["budgets"]] == [8, 16]


@pytest.mark.slow
def test_what_a_run_knows_of_itself(tmp_path):
    def half(x):
        return torch.where(x[:, 0] > 1.0, 0.0, -torch.inf)

    page = steer.importance_sampling(plane(), half, particles=64).report(tmp_path).read_text()
    numbers = numbers_in(page)
    assert 0 < numbers["forbidden"] < 64
    assert f"{numbers['forbidden']} of 64" in page
    assert "log normalizing constant" in page
    page = steer.psi(plane(), score, particles=8).report(tmp_path).read_text()
    assert "split R̂ of the start" in page
    assert "the start has no known normalizing constant" in page
    page = search.beam(plane(), score, particles=4, candidates=2).report(tmp_path).read_text()
    assert "selects samples; no importance weights" in page
    assert "effective sample size" not in page
    assert "best reward" in page
    assert "NaN" not in page


def test_a_heavy_tail_is_called_one(tmp_path):
    result = steer.importance_sampling(plane(), lambda x: 40.0 * x[:, 0], particles=200)
    assert result.pareto_k.item() > 0.7
    assert "too heavy a tail to trust" in result.report(tmp_path).read_text()


# -- trees


def words():
    return steer.load("letters", steps=4)


def many_e(x):
    return (x == 4).double().sum(1)


@pytest.mark.parametrize("build", ["unbiased", "boltzmann"])
def test_a_tree_is_drawn_within_the_page(tmp_path, build):
    result = search.dts(pictures(), score, budget=200, levels=3, build=build, key=1)
    page = result.report(tmp_path).read_text()
    check(page, scripts=("application/json", None))
    svg = page.partition('<div class="tree">')[2].partition("</svg>")[0]
    assert svg.count("<circle") == result.tree.nodes == svg.count("<title>")
    assert svg.count('class="v') == result.tree.nodes
    assert len(re.findall(r'class="v\d on"', svg)) == result.tree.depth + 1
    assert page.count("<img hidden data-side") == 1
    assert page.count('<div class="strip"') == 1
    assert "below it the reward of that prediction" in page


def test_a_large_tree_is_cut_to_its_heaviest_leaves_and_says_so():
    result = search.dts(plane(), score, particles=300, key=2, levels=3)
    weight = leaf_weights(result, 0)
    assert weight is not None
    tree = chosen(result.tree, 0, weight, leaves=20, nodes=1500)
    assert len(tree.slots[-1]) == 20
    assert tree.leaves == result.tree.leaves.size
    heaviest = set(weight.topk(19).indices.tolist())
    assert heaviest <= set(tree.slots[-1].tolist())
    assert int(tree.slots[-1][tree.best[-1]]) == int(result.reward[0].argmax())
    for d in range(1, tree.depth + 1):  # edges are the tree's own, and a parent is amid its children
        parents = result.tree.layers[d]["parent"][0][tree.slots[d]]
        assert torch.equal(parents, tree.slots[d - 1][torch.tensor(tree.above[d])])
        for i in range(len(tree.slots[d - 1])):
            below = [x for x, above in zip(tree.place[d], tree.above[d], strict=True) if above == i]
            assert min(below) <= tree.place[d - 1][i] <= max(below)
        assert tree.place[d] == sorted(tree.place[d])
    assert sum(map(len, chosen(result.tree, 0, weight, leaves=300, nodes=60).slots)) <= 60
    assert "20 of 300 leaves, those of largest weight" in tree_figure(result, leaves=20)


def test_leaves_without_weights_are_ranked_by_reward():
    result = search.dts_star(plane(), score, particles=60, key=2)
    kept = chosen(result.tree, 0, leaf_weights(result, 0), leaves=5)
    assert set(kept.slots[-1].tolist()) == set(result.reward[0].topk(5).indices.tolist())
    assert kept.weight is None
    assert leaf_weights(result.take(result.ranked()), 0) is None  # particles are leaves no more


def test_trees_of_several_problems_are_folded(tmp_path):
    page = search.dts(plane(), score, particles=12, batch=3, key=1).report(tmp_path).read_text()
    check(page, scripts=("application/json", None))
    assert (page.count("<details"), page.count("<details open"), page.count('<div class="tree">')) == (3, 1, 3)


def test_a_tree_of_texts_shows_texts(tmp_path):
    result = search.dts(words(), many_e, budget=80, levels=2, key=1)
    page = result.report(tmp_path).read_text()
    check(page, scripts=("application/json", None))
    best = result.texts[int(result.reward[0].argmax())]
    assert f"text: {best}" in page
    assert f"<span>{best}</span>" in page
    assert "<img" not in page


@pytest.mark.slow
def test_a_tree_of_a_hundred_thousand_leaves_stays_a_small_page(tmp_path):
    result = search.dts(plane(), score, particles=100_000, walkers=5000, levels=[1, 3])
    assert result.report(tmp_path).stat().st_size < 800_000


# -- the way to the best sample


@pytest.mark.parametrize("problems", [1, 2])
def test_the_way_in_a_tree_is_scored_by_its_reward(tmp_path, problems):
    """dts_star scores finished samples alone; the value of a node is that of its best leaf, and says nothing."""
    result = search.dts_star(pictures(), score, budget=60, batch=problems, key=1)
    for b in range(problems):
        stops = best_chain(result, b)
        scores = score(pictures().decode(torch.stack([stop.clean for stop in stops])[None])).tolist()
        assert [stop.value for stop in stops] == pytest.approx(scores)
        assert stops[-1].value == float(result.reward[b].max())
        assert len(set(scores)) > 1
    forgetful = dataclasses.replace(result, tree=copy.copy(result.tree))
    forgetful.tree.reward = None
    assert "below it the value of the tree" in forgetful.report(tmp_path).read_text()


@pytest.mark.parametrize("process", [plane, words])
def test_the_way_of_a_trajectory_follows_its_lineage(process):
    reward = score if process is plane else many_e
    result = steer.smc(
        process(), reward, particles=12, keep_states=True, key=4, selection=steer.resample(threshold=1.0)
    )
    stops, best = best_chain(result), int(result.reward[0].argmax())
    assert result.trajectory is not None
    assert [stop.level for stop in stops] == [*range(result.process.steps), result.process.steps]
    assert torch.equal(stops[-1].clean, result.x[0, best])
    states = result.trajectory.states()[:, best : best + 1]
    for stop in stops[:-1]:
        x = states[:, :, stop.level]
        clean = result.process.complete(x, result.process.denoise(x, stop.level))
        torch.testing.assert_close(stop.clean, clean[0, 0])
        if any(seen.k == stop.level for seen in result.seen):  # a last step without noise is not scored twice
            assert stop.value == pytest.approx(float(reward(clean[0])), rel=1e-4, abs=1e-5)
    assert [stop.value for stop in stops].count(None) <= 1
    assert stops[-1].value == pytest.approx(float(result.reward.max()))
    assert len(best_chain(result, most=3)) == 3


def test_the_way_through_a_tree_is_its_path():
    result = search.dts(plane(), score, particles=30, levels=3, batch=2, key=3)
    stops = best_chain(result, problem=1)
    assert [stop.level for stop in stops] == list(result.tree.levels)
    for stop in stops:
        assert stop.value == pytest.approx(float(score(stop.clean[None])), rel=1e-4)
    assert torch.equal(stops[-1].clean, result.best[1])


def test_no_way_where_nothing_was_kept():
    assert best_chain(steer.smc(plane(), score, particles=4)) == []
    assert best_chain(search.best_of_n(plane(), score, particles=4)) == []


def test_numbers_as_text():
    assert [number(v) for v in (None, float("nan"), -0.01234, 12345.6)] == ["–", "–", "−0.0123", "12,346"]
    assert with_error(-5.0634, 0.1824) == "−5.06 ± 0.18"
    assert with_error(0.73149, 0.0321) == "0.731 ± 0.032"
    assert with_error(2.0, float("nan")) == with_error(2.0, None) == "2"
