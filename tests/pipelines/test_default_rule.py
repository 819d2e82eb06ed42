"""The rule that takes the place of a scheduler: said in one line, and the scheduler's own law where steer has it."""

import copy
import itertools
import logging

import diffusers
import pytest
import torch
from tiny_pipelines import STABLE_DIFFUSION_NOISE as SD
from tiny_pipelines import build, process_of

import steer
from steer.pipelines import noise_levels
from steer.pipelines.default_rule import StrategicStochastic, chosen_rule
from steer.processes import schedules

DISTILLED = {
    "lcm": diffusers.LCMScheduler(**SD),
    "lcm-ends-noisy": diffusers.LCMScheduler(**SD, set_alpha_to_one=False),
    "tcd": diffusers.TCDScheduler(**SD),
    "scm": diffusers.SCMScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow-lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_schedulers_step_has_the_mean_and_the_noise_of_the_rule(name, monkeypatch):
    """Its draws replaced by zeros give the mean, by ones the mean plus one standard deviation."""
    scheduler = copy.deepcopy(DISTILLED[name])
    scheduler.set_timesteps(2 if name == "scm" else 4)
    length = len(scheduler.timesteps) - (name == "scm")
    grid = noise_levels.read_grid(scheduler, 0, length)
    levels = [schedules.level(grid.schedule, t) for t in grid.times]
    rule = chosen_rule(scheduler, None)
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 1, 4, 4, 4, generator=generator) for _ in range(2))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    for k, (here, there) in enumerate(itertools.pairwise(levels)):
        drawn = []
        for number in (0.0, 1.0):
            monkeypatch.setattr(
                module, "randn_tensor", lambda shape, *_, number=number, **__: torch.full(shape, number)
            )
            player = copy.deepcopy(scheduler)
            player._step_index = grid.indices[k]
            drawn.append(player.step(output[0], scheduler.timesteps[grid.indices[k]], x[0], return_dict=False)[0])
        x0 = noise_levels.x0_from_output(output, x, here, grid.kind, grid.data_std)
        step = rule(x, x0, here, there)
        # LCM mixes c_skip of x into x_0, 7e-6 at the last of these timesteps.
        torch.testing.assert_close(step.mean[0], drawn[0], rtol=0, atol=3e-5 * float(x0.abs().max()))
        torch.testing.assert_close(torch.full_like(x[0], step.std), drawn[1] - drawn[0], rtol=0, atol=3e-5)


def opened(scheduler, **options):
    pipe, call = build("sd15")
    pipe.scheduler = scheduler
    return steer.from_pipeline(pipe, steps=3, **call, **options)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (diffusers.UniPCMultistepScheduler(**SD), "UniPCMultistepScheduler -> ancestral ddim(eta=1.0)"),
        (diffusers.LCMScheduler(**SD), "LCMScheduler -> cps(eta=1.0), the re-noising steps"),
        (diffusers.TCDScheduler(**SD), "TCDScheduler -> StrategicStochastic(gamma=0.3), the re-noising steps"),
        (diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing"), None),
    ],
)
def test_opening_says_what_replaces_the_scheduler_in_one_line(scheduler, said, caplog):
    with caplog.at_level(logging.WARNING, "steer"):
        opened(scheduler)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (said is not None)
        assert said is None or lines[0].startswith(said)
        caplog.clear()
        opened(scheduler, transition=steer.ddim(0.5))
    assert not caplog.records


def test_eta_is_honoured_or_refused():
    assert process_of("sd15", eta=0.3).rule == steer.ddim(0.3)
    assert opened(diffusers.TCDScheduler(**SD), eta=0.6).rule.gamma == 0.6
    with pytest.raises(steer.ModelError, match="UniPCMultistepScheduler would ignore it"):
        opened(diffusers.UniPCMultistepScheduler(**SD), eta=0.3)
    with pytest.raises(steer.ModelError, match="transition= sets the noise"):
        process_of("sd15", eta=0.3, transition=steer.ddim(1.0))


def test_strategic_stochastic_sampling_is_a_valid_rule():
    """Its steps between two levels of the table keep the marginals: variance of eps and noise sum to sigma^2."""
    table = tuple(diffusers.TCDScheduler(**SD).alphas_cumprod.double().tolist())
    schedule = schedules.Trigonometric()
    here, there = (schedules.level(schedule, t) for t in (0.8, 0.4))
    stds = [StrategicStochastic(gamma, table).std(here, there) for gamma in (0.0, 0.3, 1.0)]
    assert stds[0] == 0.0 < stds[1] < stds[2] <= there.sigma
