"""Noise levels, prediction types and timesteps of diffusers' schedulers, against the schedulers' own arithmetic."""

import copy
import math

import diffusers
import pytest
import torch

import steer
from steer.pipelines import noise_levels
from steer.processes import schedules
from steer.types import Level

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler(),
    "ddim": diffusers.DDIMScheduler(set_alpha_to_one=False, timestep_spacing="trailing"),
    "ddim-zero-snr": diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "pndm": diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "lcm": diffusers.LCMScheduler(**SD),
    "tcd": diffusers.TCDScheduler(**SD),
    "euler": diffusers.EulerDiscreteScheduler(**SD),
    "euler-leading": diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "euler-karras": diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "euler-zero-snr": diffusers.EulerDiscreteScheduler(
        **SD, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(**SD),
    "heun": diffusers.HeunDiscreteScheduler(**SD),
    "lms": diffusers.LMSDiscreteScheduler(**SD),
    "dpm": diffusers.DPMSolverMultistepScheduler(**SD),
    "dpm-karras": diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, prediction_type="v_prediction"),
    "dpm-ends-noisy": diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min"),
    "dpm-flow": diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
    "dpm-single": diffusers.DPMSolverSinglestepScheduler(**SD),
    "unipc": diffusers.UniPCMultistepScheduler(**SD),
    "unipc-flow": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    ),
    "deis": diffusers.DEISMultistepScheduler(**SD),
    "edm": diffusers.EDMEulerScheduler(),
    "edm-dpm": diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow-shift": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-dynamic": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "flow-karras": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "flow-heun": diffusers.FlowMatchHeunDiscreteScheduler(),
}

ENDS_NOISY = ("ddim", "pndm", "tcd", "deis", "dpm-ends-noisy")  # TCD's own last step ends at timestep 0


def grid_of(name, steps=7):
    scheduler = copy.deepcopy(SCHEDULERS[name])
    scheduler.set_timesteps(steps, **({"mu": 0.7} if name == "flow-dynamic" else {}))
    return scheduler, noise_levels.read_grid(scheduler, 0, len(scheduler.timesteps))


def levels_of(grid):
    return [schedules.level(grid.schedule, t) for t in grid.times]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_are_those_at_which_the_scheduler_adds_noise(name):
    """x_0 = 1 without noise comes back as alpha, noise = 1 on nothing as sigma, on a fresh copy of the scheduler."""
    scheduler, grid = grid_of(name)
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    for index, at in zip(grid.indices, levels_of(grid)[:-1], strict=True):
        t = scheduler.timesteps[index : index + 1]
        add = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
        given = [(one, t, none), (none, t, one)] if add == "scale_noise" else [(one, none, t), (none, one, t)]
        alpha, sigma = (float(getattr(copy.deepcopy(scheduler), add)(*arguments)) for arguments in given)
        assert math.isclose(at.alpha, alpha, rel_tol=2e-6, abs_tol=2e-6)
        assert math.isclose(at.sigma, sigma, rel_tol=2e-6, abs_tol=2e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_grids_fall_to_data_and_know_their_steps(name):
    _, grid = grid_of(name)
    assert all(a > b for a, b in zip(grid.times[:-1], grid.times[1:-1], strict=False))
    assert [grid.step_at(t) for t in grid.times[:-1]] == list(range(len(grid.indices)))
    middle = 0.5 * (grid.times[2] + grid.times[3])
    assert grid.step_at(middle) is None
    assert grid.step_before(middle) == 2
    last = levels_of(grid)[-1]
    assert (last.sigma == 0.0) is (name not in ENDS_NOISY)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_between_levels_continue_the_table(name):
    scheduler, grid = grid_of(name)
    for at, timestep in zip(levels_of(grid)[:-1], grid.timesteps, strict=True):
        # solvers round to whole timesteps, or down to them, where their levels are not those of a whole one
        tolerance = 1.0 if not name.startswith("edm") else 1e-5
        assert abs(noise_levels.timestep_at(scheduler, at) - timestep) < tolerance + 1e-6 * timestep


def own_conversion(scheduler, output, x, index):
    """x_0 as the scheduler itself reads it from an output, or None where it does not say."""
    fresh = copy.deepcopy(scheduler)
    t = fresh.timesteps[index]
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(index)
    if hasattr(fresh, "convert_model_output"):
        fresh._init_step_index(t)
        return fresh.convert_model_output(output, sample=x)
    if hasattr(fresh, "is_scale_input_called"):
        fresh.is_scale_input_called = True
    result = fresh.step(output, t, x, generator=torch.Generator().manual_seed(0))
    return result.get("pred_original_sample")


KINDS = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "ancestral", "dpm", "unipc", "deis", "edm", "edm-dpm"])
def test_outputs_mean_what_the_scheduler_takes_them_for(name, kind):
    if kind == "sample" and name in ("euler", "ancestral", "edm", "edm-dpm"):
        pytest.skip(f"{name} does not predict samples")
    options = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    options |= {"algorithm_type": "deis"} if name == "deis" else {}
    scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config, prediction_type=kind, **options)
    scheduler.set_timesteps(7)
    grid = noise_levels.read_grid(scheduler, 0, len(scheduler.timesteps))
    draw = torch.Generator().manual_seed(0)
    for k in (0, 3, 6):
        at = schedules.level(grid.schedule, grid.times[k])
        output, x = torch.randn(2, 5, generator=draw), torch.randn(2, 5, generator=draw) * math.hypot(1.0, at.sigma)
        theirs = own_conversion(scheduler, output, x, grid.indices[k])
        if theirs is None:
            pytest.skip(f"{name} does not say its x_0")
        if name == "deis":  # it works with eps
            theirs = (x - at.sigma * theirs) / at.alpha
        ours = noise_levels.x0_from_output(output, x, at, grid.kind, grid.data_std)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


def test_flow_output_is_noise_minus_data():
    x0, eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    at = schedules.level(schedules.RectifiedFlow(), 0.3)
    x = at.alpha * x0 + at.sigma * eps
    torch.testing.assert_close(noise_levels.x0_from_output(eps - x0, x, at, "flow_prediction"), x0)
    torch.testing.assert_close(noise_levels.x0_from_output(x0 - eps, x, at, "reversed_flow"), x0)


def test_pure_noise_needs_a_prediction_that_says_something_there():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    with pytest.raises(steer.ModelError, match="zero terminal SNR"):
        noise_levels.read_grid(scheduler, 0, 5)
    _, grid = grid_of("ddim-zero-snr")
    assert schedules.level(grid.schedule, grid.times[0]).alpha == 0.0


def test_unknown_schedulers_and_thresholding_are_named():
    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(steer.ModelError, match="KDPM2DiscreteScheduler"):
        noise_levels.read_grid(scheduler, 0, 5)
    scheduler = diffusers.DDPMScheduler(thresholding=True)
    scheduler.set_timesteps(5)
    with pytest.raises(steer.ModelError, match="thresholding"):
        noise_levels.read_grid(scheduler, 0, 5)


@pytest.mark.parametrize("schedule", [schedules.Trigonometric(), schedules.Trigonometric(0.5)])
def test_trigonometric_path_derivatives(schedule):
    for t in (0.1, 0.5, 0.9):
        after, before, at = schedule(t + 1e-6), schedule(t - 1e-6), schedule(t)
        assert math.isclose((after.alpha - before.alpha) / 2e-6, at.d_alpha, rel_tol=1e-7)
        assert math.isclose((after.sigma - before.sigma) / 2e-6, at.d_sigma, rel_tol=1e-7)
    assert schedule(1.0).alpha == 0.0
    assert schedule(0.0) == (1.0, 0.0, -0.0, pytest.approx(0.5 * math.pi * schedule.scale))


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
def test_the_continuous_time_of_stable_cascade(scaler):
    """Its table against add_noise, its clock against its table, and ancestral sampling against its own step."""
    scheduler = diffusers.DDPMWuerstchenScheduler(scaler=scaler)
    scheduler.set_timesteps(6)
    grid = noise_levels.read_grid(scheduler, 0, 6)
    process = steer.from_denoiser(lambda x, t: x, grid.schedule, grid.times, event=(3,), transition=steer.ddim(1.0))
    x, eps = (torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for k, t in enumerate(grid.timesteps):
        at, told = process.levels[k], torch.tensor([t])
        ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
        assert float(scheduler.add_noise(ones, zeros, told)) == pytest.approx(at.alpha, abs=1e-6)
        assert float(scheduler.add_noise(zeros, ones, told)) == pytest.approx(at.sigma, abs=1e-6)
        if k > 0:  # the first level is clipped, where many times have one noise level
            assert noise_levels.timestep_at(scheduler, at) == pytest.approx(t, abs=1e-5)
        law = process.transition(x, noise_levels.x0_from_output(eps, x, at, grid.kind), k)
        moved = scheduler.step(eps[0], told, x[0], generator=torch.Generator().manual_seed(3), return_dict=False)[0]
        noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(3)) if k + 1 < len(grid.timesteps) else 0.0
        torch.testing.assert_close(law.mean[0] + law.std * noise, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "euler", "euler-karras", "dpm", "lcm"])
def test_between_two_timesteps_of_the_table_is_between_them(name):
    """A third of the way from timestep 100 to 101 in log(sigma / alpha) is timestep 100.33."""
    scheduler, _ = grid_of(name)
    kept = scheduler.alphas_cumprod.double()
    ratio = (0.5 * ((1.0 - kept) / kept).log())[[100, 101]]
    between = float(ratio[0] + (ratio[1] - ratio[0]) / 3.0)
    alpha = (1.0 + math.exp(2.0 * between)) ** -0.5
    at = Level(0.1, alpha, alpha * math.exp(between), 0.0, 0.0)
    assert noise_levels.timestep_at(scheduler, at) == pytest.approx(100.0 + 1.0 / 3.0, abs=1e-6)


def test_between_two_sigmas_of_a_flow_is_between_their_timesteps():
    scheduler, _ = grid_of("flow")
    sigmas, told = scheduler.sigmas.double(), scheduler.timesteps.double()
    for i in range(len(told) - 1):
        sigma = float(0.75 * sigmas[i] + 0.25 * sigmas[i + 1])
        expected = float(0.75 * told[i] + 0.25 * told[i + 1])
        assert noise_levels.timestep_at(scheduler, Level(sigma, 1.0 - sigma, sigma, -1.0, 1.0)) == pytest.approx(
            expected
        )
    assert noise_levels.timestep_at(scheduler, Level(0.0, 1.0, 0.0, -1.0, 1.0)) == 0.0


@pytest.mark.parametrize("name", ["euler", "euler-karras", "ancestral", "heun", "lms", "edm"])
def test_networks_see_states_scaled_as_the_scheduler_scales_them(name):
    scheduler, grid = grid_of(name)
    fresh, ones = copy.deepcopy(scheduler), torch.ones(1)
    for at, index in zip(levels_of(grid)[:-1], grid.indices, strict=True):
        scaled = copy.deepcopy(fresh).scale_model_input(ones, fresh.timesteps[index])
        # A state of steer has alpha x_0 + sigma eps as the scheduler's has it: sigma-space ones have alpha = 1.
        assert noise_levels.input_scale(scheduler, at) == pytest.approx(float(scaled), rel=1e-5)
