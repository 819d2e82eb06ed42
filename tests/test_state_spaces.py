"""Every public use on every kind of process: it runs, or refuses by an error that says what came and the cure.

A use that needs a Gaussian path, a transition rule, a Gaussian prior or noise in the steps asks for it at its door
(`need_gaussian` and its kind), so that nobody meets an AttributeError from inside.
"""

import functools
import re

import pytest
import torch
from exact import Linear

import steer
from steer import grpo, guidance, search
from steer.processes.gaussian import has_levels, is_gaussian
from steer.processes.second_order import noisy
from steer.search import selection, values

STEPS = 3
MEAN = [0.3, -0.2]


def reward(x):
    """Differentiable in states, and defined for tokens and pictures too."""
    return 0.5 * x.flatten(1)[:, 0].double()


def model(**options):
    return steer.models.gaussian(MEAN, 0.8, steps=STEPS, **options)


def flow():
    return steer.from_velocity(lambda x, t: x, steer.RectifiedFlow(), STEPS, event=(2,), transition=steer.ode())


def solver():
    """A pipeline under its own multistep solver."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    import toy_pipelines

    pipe = toy_pipelines.Loop(toy_pipelines.Toy(), diffusers.DPMSolverMultistepScheduler())
    return steer.own_solver(steer.from_pipeline(pipe, prompt="a", steps=STEPS))


def masked():
    table = torch.tensor([0.2, 0.5, 0.3]).log()
    return steer.from_logits(lambda x, t: table.expand(*x.shape, 3), STEPS, length=2, vocabulary=3)


KINDS = {
    "gaussian": model,
    "flow": flow,
    "guided": lambda: steer.guide(model(), steer.mpgd(reward, 0.1)),
    "restart": lambda: steer.restart(model(), [(0.05, 2.0, 1)]),
    "second order": lambda: model(transition=steer.second_order()),
    "solver": solver,
    "composite": lambda: steer.Composite((model(), model()), lambda level: (0.5, 0.5)),
    "masked": masked,
}


def clean(process):
    """Finished states, (1, 2, *event)."""
    return torch.zeros(1, 2, *process.event, dtype=process.dtype)


def run(method, **options):
    return lambda process: method(process, reward, particles=4, key=1, **options)


def search_on(budget=40, **options):
    return lambda process: search.noise_search(process, reward, budget=budget, key=1, **options)


def hooked(hooks):
    """Hooks, which may be a function of the process, in the process and a chain of it."""
    return lambda process: run(steer.rollout)(steer.guide(process, hooks(process) if callable(hooks) else hooks))


def branched(process):
    return grpo.branch(process, reward, groups=1, splits=[0], ways=2, key=1)


def with_latents(process):
    latents = noisy(process, process.prior(steer.Key(0), 1, 4))
    return run(steer.rollout, start=steer.from_latents(latents.flatten(0, 1)))(process)


def score_hook(at):
    return 1.1 * at.score


def x0_hook(at):
    return 0.9 * at.x0


def classifier(x, log_snr):
    return torch.stack([x.flatten(1)[:, 0], -x.flatten(1)[:, 0]], 1)


USES = {name: functools.partial(steer.sample, reward=reward, method=name, budget=64) for name in steer.methods()}
USES |= {
    # starts
    "start pcnl": run(steer.rollout, start=steer.pcnl(chains=2, burn_in=1, kept=2, temperature=1.0)),
    "start mala": run(steer.rollout, start=steer.mala(chains=2, burn_in=1, kept=2, temperature=1.0)),
    "start ula": run(steer.rollout, start=steer.ula(chains=2, burn_in=1, kept=2, temperature=1.0)),
    "start top_k": run(steer.smc, start=steer.top_k_of_n(6)),
    "start latents": with_latents,
    # proposals
    "guided": run(steer.smc, proposal=steer.guided(0.5)),
    "twisted": run(steer.smc, proposal=steer.twisted(0.5)),
    "follow": run(steer.smc, proposal=steer.follow(steer.mpgd(reward, 0.1))),
    "follow in a tree": run(search.dts, proposal=steer.follow(steer.mpgd(reward, 0.1))),
    # weights and selections
    "tempered": run(steer.smc, weight=steer.difference(tempering=steer.adaptive_tempering())),
    "tempered by the signal": run(steer.smc, weight=steer.difference(tempering=steer.snr_share)),
    "path_moves": lambda process: run(steer.smc, selection=steer.resample(moves=steer.path_moves([1, process.steps])))(
        process
    ),
    "birth_death": lambda process: steer.fkc(process, reward, particles=4, selection=steer.birth_death()),
    # other processes made of one
    "convert": lambda process: steer.convert(process, steer.RectifiedFlow()),
    "restart": lambda process: steer.restart(process, [(0.05, 2.0, 1)]),
    "recur": lambda process: steer.recur(process, 2),
    "compose": lambda process: steer.compose(process, exponent=2.0),
    "own_solver": steer.own_solver,
    "verify": steer.verify,
    "with_rule": lambda process: process.with_rule(steer.ddim(0.5)) if is_gaussian(process) else None,
    # hooks
    "hooks score": hooked(steer.Hooks(score=(score_hook,))),
    "hooks x0": hooked(steer.Hooks(x0=(x0_hook,))),
    "hooks mean": hooked(steer.mpgd(reward, 0.1)),
    "hooks through": hooked(steer.dps(reward, 0.1)),
    "hooks start": hooked(lambda process: steer.prior_guidance(process)),
    "hooks after": hooked(guidance.corrector()),
    "density guidance": hooked(lambda process: steer.density_guidance(process, q=0.4)),
    "delta_of": lambda process: guidance.delta_of(process, 0.4),
    "classifier_free": lambda process: run(steer.rollout)(steer.classifier_free(process, process, 2.0)),
    "adaptive": lambda process: guidance.adaptive(process, process, 2.0, particles=2),
    "tune": lambda process: guidance.tune(
        lambda rho: steer.dps(reward, rho),
        process,
        reward,
        start=(0.1,),
        factors=(2.0,),
        most=(1.0,),
        rounds=1,
        particles=2,
    ),
    # minority sampling
    "minority boost": lambda process: run(steer.rollout)(steer.minority(process, steer.boost_and_skip(0.05))),
    "minority self": lambda process: run(steer.rollout)(steer.minority(process, steer.self_guided(1.0, every=1))),
    "minority classifier": lambda process: run(steer.rollout)(
        steer.minority(process, steer.minority_guidance(classifier))
    ),
    "minority_score": lambda process: steer.minority_score(process, clean(process), draws=2),
    # training data
    "grpo collect": lambda process: grpo.collect(process, reward, groups=1, group_size=2, key=1),
    "grpo branch": branched,
    "grpo granular": lambda process: grpo.granular(process, reward, groups=1, level=0, key=1),
    "grpo steered": lambda process: grpo.collect(process, reward, groups=1, group_size=2, method=steer.smc),
    # searches over noise, and values
    "random_search": search_on(strategy=search.random_search()),
    "paths": search_on(strategy=search.paths()),
    "epsilon_greedy": search_on(strategy=search.epsilon_greedy()),
    "look_ahead": lambda process: search.svdd(process, reward, particles=2, value=values.look_ahead(1)),
    "learned value": lambda process: search.svdd(
        process, reward, particles=2, value=values.learned(lambda x, k: reward(x))
    ),
    "select top": lambda process: search.beam(process, reward, particles=4, select=selection.top()),
    # weighted SDEs
    "fkc at_state": run(steer.fkc, look_ahead=steer.at_state()),
    "fkc ode_steps": run(steer.fkc, look_ahead=steer.ode_steps(2)),
    "fkc feynman_kac": run(steer.fkc, weight=steer.FeynmanKac(), look_ahead=steer.at_state()),
    "driftlite vcg": run(steer.driftlite, look_ahead=steer.at_state()),
    "guidance and annealing": lambda process: steer.fkc(
        process, reward, particles=4, unconditional=process, guidance=1.5
    ),
    # judging
    "preflight": lambda process: steer.preflight(process, reward, samples=4),
    "compare": lambda process: steer.compare(process, reward, methods=["smc"], budget=20, keys=2),
    "texts": lambda process: run(steer.rollout)(process).texts,
    "decoded": lambda process: run(steer.rollout)(process).decoded,
    "exact": lambda process: process.exact(Linear([0.7, -0.5])) if is_gaussian(process) else None,
}


# A step that remembers is no step of a noised distribution, whose powers and products weighted SDEs need.
NEEDS_MARGINALS = {name for name in USES if name.startswith(("fkc", "driftlite"))} | {
    "birth_death", "compose", "guidance and annealing",
}  # fmt: skip
# What every kind is for: a refusal here is a regression, however well it is worded.
MUST_RUN = {
    "gaussian": USES.keys() - {"own_solver", "verify", "texts"},
    "flow": {"rollout", "best_of_n", "noise_search", "hooks mean", "convert", "restart", "minority self", "preflight"},
    "guided": {"smc", "tds", "das", "dts", "svdd", "beam", "particle_gibbs", "hooks mean", "minority self", "exact"},
    "restart": {"smc", "tds", "svdd", "dts", "rbf", "depth_first", "hooks mean", "start pcnl", "path_moves"},
    "second order": USES.keys() - {"own_solver", "verify", "texts", "grpo granular"} - NEEDS_MARGINALS,
    "solver": {"rollout", "best_of_n", "noise_search", "random_search", "start pcnl", "start latents", "preflight"},
    "composite": {"smc", "fkc", "driftlite", "best_of_n", "svdd", "fkc ode_steps", "minority_score", "path_moves"},
    "masked": {"smc", "best_of_n", "svdd", "dts", "dts_star", "beam", "rbf", "depth_first", "compare", "preflight"},
}
CURE = re.compile(r"; |\b(use|give|leave|take) ")


@functools.cache
def process_of(kind):
    return KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_it_runs_or_says_why_not(use, kind):
    process = process_of(kind)
    try:
        USES[use](process)
    except steer.SteerError as error:
        message = str(error)
        assert use not in MUST_RUN[kind], message
        assert CURE.search(message), message
        if isinstance(error, steer.StateSpaceError):
            assert type(process).__name__ in message, message


def test_rules_and_levels_are_two_things():
    """A composition has noise levels and no rule, a pipeline's solver neither, and a guided process both."""
    found = {kind: (has_levels(process_of(kind)), is_gaussian(process_of(kind))) for kind in KINDS}
    both, neither = (True, True), (False, False)
    assert found == {
        "gaussian": both,
        "flow": both,
        "guided": both,
        "restart": both,
        "second order": both,
        "solver": neither,
        "composite": (True, False),
        "masked": neither,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_says_what_every_process_has(kind):
    process = process_of(kind)
    drawn = process.prior(steer.Key(0), 1, 2)
    assert drawn.dtype == process.dtype
    assert drawn.device == torch.device(process.device)
    assert len(process.visits) == process.steps + 1
    assert process.text is None
    assert (process.hooks is not None) == (kind == "guided")
    assert (process.prior_moments is None) == (kind == "masked")
