"""A pipeline's own solver, its memory in the particle."""

import copy

import diffusers
import pytest
import torch
from tiny_pipelines import build, steps_recorded

import steer
from steer import search

DIFFUSION = [
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"]
CASES = [("sd15", name) for name in DIFFUSION] + [("wan", name) for name in FLOW]
STEPS = 6


def opened(family, name):
    pipe, call = build(family)
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name.startswith("UniPC") else {}
    kind = getattr(diffusers, name)
    shared = pipe.scheduler.config if family == "sd15" else {}
    pipe.scheduler = kind.from_config(shared, **(options if family == "wan" else {}))
    return pipe, call, steer.own_solver(steer.from_pipeline(pipe, steps=STEPS, **call))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_is_the_pipelines_own_run(family, name):
    pipe, call, process = opened(family, name)
    with steps_recorded(pipe) as seen:
        pipe(**call, num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(3))
    assert process.steps == len(seen)
    latents = torch.stack([seen[0][1], 0.5 * seen[0][1]], 1)  # another particle beside it
    x = torch.cat([latents[:, :, None], torch.zeros(1, 2, process.slots, *latents.shape[2:])], 2)
    with torch.no_grad():
        for k in range(process.steps):
            torch.testing.assert_close(x[:, 0, 0], seen[k][1], rtol=1e-4, atol=1e-4 * float(seen[k][1].abs().max()))
            x = process.transition(x, process.denoise(x, k), k).mean
            if k == process.steps // 2:
                x = x.flip(1).flip(1)[:, [0, 0, 1]][:, [1, 2]]  # resampled and put back
    torch.testing.assert_close(x[:, 0, 0], seen[-1][2], rtol=1e-4, atol=1e-4 * float(seen[-1][2].abs().max()))


def test_memory_moves_with_its_particle():
    """Forgetting it changes the run, so the equality above is one of memory too."""
    _, _, process = opened("sd15", "DPMSolverMultistepScheduler")
    assert process.slots == 2
    x = process.prior(steer.Key(0), 1, 3)
    with torch.no_grad():
        for k in range(3):
            x = process.transition(x, process.denoise(x, k), k).mean
        straight = process.transition(x, process.denoise(x, 3), 3).mean
        moved = x[:, [2, 0, 1]]
        torch.testing.assert_close(process.transition(moved, process.denoise(moved, 3), 3).mean, straight[:, [2, 0, 1]])
        mixed = torch.cat([x[:, [2, 0, 1], :1], x[:, :, 1:]], 2)
        wrong = process.transition(mixed, process.denoise(mixed, 3), 3).mean
    assert float((wrong - straight[:, [2, 0, 1]]).abs().max()) > 1e-2


@pytest.mark.slow
def test_searches_of_noise_run_on_it_and_others_say_why_not():
    _, _, process = opened("sd15", "DPMSolverMultistepScheduler")

    def reward(images):
        return images.mean((1, 2, 3))

    result = search.best_of_n(process, reward, particles=3)
    assert result.cost.nfe == 3 * STEPS * 2
    assert len(result.images) == 3
    assert result.images[0].size == (16, 16)
    assert search.noise_search(process, reward, budget=2 * 4 * STEPS).cost.nfe == 2 * 4 * STEPS
    with pytest.raises(steer.NotStochasticError):
        steer.smc(process, reward, particles=3)
    with pytest.raises(steer.StateSpaceError, match="noised back"):
        search.depth_first(process, reward, budget=4 * 2 * STEPS)


def test_what_has_no_solver_of_its_own_is_refused():
    pipe, call = build("sd15")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(steer.ModelError, match="draws noise in its steps"):
        steer.own_solver(steer.from_pipeline(pipe, steps=4, **call))
    with pytest.raises(steer.ModelError, match="this process has none"):
        steer.own_solver(steer.from_denoiser(lambda x, t: x, steer.VP(), 4, event=(2,)))


def test_steps_leave_nothing_of_their_particles_behind():
    """What a scheduler shares before each step holds no tensor of a run after it: multistep solvers shift theirs."""
    _, _, process = opened("sd15", "DPMSolverMultistepScheduler")
    before = [copy.deepcopy(each.shared) for each in process.solver_steps]
    plain = vars(process.scheduler)["model_outputs"][:]
    first = steer.rollout(process, lambda x: x.flatten(1).mean(1), particles=2).x
    for each, shared in zip(process.solver_steps, before, strict=True):
        assert each.shared["model_outputs"] == shared["model_outputs"]
        assert not any(torch.is_tensor(entry) for entry in each.shared["model_outputs"])
    assert vars(process.scheduler)["model_outputs"] == plain
    assert torch.equal(steer.rollout(process, lambda x: x.flatten(1).mean(1), particles=2).x, first)


def opened_with(algorithm, transition, steps, **options):
    """A tiny pipeline under a multistep scheduler, as a process under a rule of steer's."""
    pipe, call = build("sd15")
    kind = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, algorithm_type=algorithm, **options)
    return steer.from_pipeline(pipe, steps=steps, transition=transition, **call)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "steps"), [("midpoint", 6), ("midpoint", 16), ("heun", 6)])
def test_the_second_order_rule_without_noise_is_dpm_solver_2m(solver, steps):
    """DPMSolverMultistepScheduler, dpmsolver++, order 2, midpoint: its default. Its heun form is another."""

    def samples(process):
        return steer.rollout(process, lambda images: images.mean((1, 2, 3)), particles=1, keep_states=False).x

    ours = samples(opened_with("dpmsolver++", steer.second_order(0.0), steps))
    process = opened_with("dpmsolver++", steer.ode(), steps, solver_type=solver)
    theirs = samples(steer.own_solver(process))[:, :, 0]
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    assert apart < 1e-5 if solver == "midpoint" else apart > 1e-4


@pytest.mark.slow
def test_the_second_order_rule_at_tau_1_is_sde_dpm_solver():
    """sde-dpmsolver++ of order 2, the same noise given to both; tau = .9 is another chain."""
    process = opened_with("sde-dpmsolver++", steer.second_order(1.0), STEPS)
    theirs = copy.deepcopy(process.denoiser.call.scheduler.plain())
    off = {1.0: 0.0, 0.9: 0.0}
    x = process.prior(steer.Key(0), 1, 1)
    with torch.no_grad():
        for k, timestep in enumerate(theirs.timesteps):
            noise = steer.Key(1).at(k).normal(x[:, :, 0].shape)
            x0 = process.denoise(x, k)
            output = process.denoiser.output(x[:, :, 0], process.denoiser.grid.indices[k])
            other = theirs.step(output[0], timestep, x[0, :, 0], variance_noise=noise[0]).prev_sample[None]
            for tau in off:
                step = process.with_rule(steer.second_order(tau)).transition(x, x0, k)
                drawn = step.mean + step.std * noise
                off[tau] = max(off[tau], float((drawn - other).abs().max() / other.abs().max()))
            x = drawn_state(process, x, x0, k, noise)
    assert off[1.0] < 1e-5
    assert off[0.9] > 1e-3


def drawn_state(process, x, x0, k, noise):
    """The state that a step leads to by the given noise, with what it remembers."""
    step = process.transition(x, x0, k)
    drawn = step.mean + step.std * noise
    return drawn if k + 1 == process.steps else step.beside(drawn)
