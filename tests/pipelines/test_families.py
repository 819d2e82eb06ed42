"""A small pipeline of each family of diffusers, through steer and by itself."""

import copy

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import FAMILIES, build, near, steps_recorded

import steer

STEPS = 4
ROWS = dict.fromkeys(FAMILIES, 2) | {"flux": 1, "flux2": 1, "ddpm": 1}


def opened(name, **options):
    """(pipeline, process) of a family; DDPM takes the general way by a scheduler that bare UNets do not know."""
    pipe, call = build(name)
    if name == "ddpm":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    return pipe, steer.from_pipeline(pipe, steps=STEPS, **call, **options)


def plain(name, pipe):
    """Every step of the pipeline's own run, and its output as a tensor."""
    kind = "np" if name == "ddpm" else "pt"
    with steps_recorded(pipe) as seen:
        output = pipe(
            **build(name)[1],
            num_inference_steps=STEPS,
            output_type=kind,
            return_dict=False,
            generator=torch.Generator().manual_seed(3),
        )[0]
    return seen, torch.from_numpy(output).permute(0, 3, 1, 2) if name == "ddpm" else output


@pytest.mark.parametrize("name", FAMILIES)
def test_eta_zero_is_the_pipeline(name):
    pipe, process = opened(name, transition=steer.ddim(0.0))
    seen, output = plain(name, pipe)
    x = seen[0][1][None]
    assert tuple(x.shape[2:]) == process.event
    assert process.rows == ROWS[name]
    with torch.no_grad():
        for k in range(process.steps):
            x = process.transition(x, process.denoise(x, k), k).mean
            near(x[0], seen[k][2], 1e-5)
        near(process.decode(x), output, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_and_output_are_the_pipelines_to_the_last_bit(name):
    """In any order of steps, and for a batch as for single rows."""
    _, process = opened(name)
    verified = steer.verify(process)
    assert verified[:3] == (3, 0.0, 0.0)
    assert verified.batched < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prior_is_what_the_pipeline_starts_from(name):
    pipe, process = opened(name)
    ours = process.prior(steer.Key(0), 1, 400)
    assert process.initial is not None
    seen, _ = plain(name, pipe)
    assert seen[0][1].shape[1:] == ours.shape[2:]
    mean, std = process.initial
    assert float(mean.abs().max()) == 0.0
    assert std == pytest.approx(float(getattr(pipe.scheduler, "init_noise_sigma", 1.0)), rel=1e-5)
    size = ours.numel()
    assert abs(float(ours.double().mean())) < 4 * std / size**0.5
    assert abs(float(ours.double().square().mean()) / std**2 - 1.0) < 4 * (2 / size) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_levels_off_the_grid(name):
    """The derivative along a direction by autograd and by differences; times between two levels, and onto one."""
    _, process = opened(name)
    x, direction = (process.prior(steer.Key(i), 1, 2) for i in (1, 2))
    x.requires_grad_()
    x0 = process.denoiser(x, process.times[2])
    weight = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((x0 * weight).sum(), x)
    with torch.no_grad():
        # pipelines cast to float32 here and there, so differences are rough; the next test is exact
        ahead, behind = (process.denoiser(x + s * direction, process.times[2]) for s in (1e-2, -1e-2))
        slope = float(((ahead - behind) * weight).double().sum() / 2e-2)
        assert float((gradient * direction).double().sum()) == pytest.approx(slope, rel=0.05)
        near(process.denoiser(x, process.times[2] * (1 + 1e-12)), x0, 1e-4)
        between = process.denoiser(x, 0.5 * (process.times[2] + process.times[1]))
    assert bool(between.isfinite().all())
    picture = process.decode(process.denoise(x, 3))
    (gradient,) = torch.autograd.grad(picture.mean(), x)
    assert float(gradient.abs().max()) > 0.0


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_the_gradient_is_that_of_the_guided_network(name):
    """Against autograd through the pipeline's own body, run by hand from the recorded network calls."""
    pipe, process = opened(name)
    network = pipe.unet if name == "sd15" else pipe.transformer
    calls = []
    hook = network.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    x = process.prior(steer.Key(1), 1, 1)
    with torch.no_grad():
        process.denoise(x, 1)
    hook.remove()

    def guided(latents):
        outputs = []
        for args, kwargs in calls:
            args, kwargs = list(args), dict(kwargs)
            rows = torch.cat([latents] * (2 if name == "sd15" else 1))
            if args:
                args[0] = rows
            else:
                kwargs["hidden_states"] = rows
            outputs.append(network(*args, **kwargs)[0])
        parts = outputs[0].chunk(2) if name == "sd15" else outputs
        if len(parts) == 1:
            return parts[0]
        free, bound = parts if name == "sd15" else reversed(parts)
        return free + 5.0 * (bound - free)

    ours, theirs = x.clone().requires_grad_(), x[0].clone().requires_grad_()
    a = process.denoiser.call.predict(ours[0], (0,), 1, 1)
    b = guided(theirs)
    near(a.detach(), b.detach(), 1e-6)
    weight = torch.randn(b.shape, generator=torch.Generator().manual_seed(0))
    (left,), (right,) = (torch.autograd.grad((y * weight).sum(), v) for y, v in ((a, ours), (b, theirs)))
    near(left[0], right, 1e-5)


SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "sde-dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "karras": diffusers.EulerDiscreteScheduler,
}
OPTIONS = {"pndm": {"skip_prk_steps": True}, "sde-dpm": {"algorithm_type": "sde-dpmsolver++"}}
OPTIONS["karras"] = {"use_karras_sigmas": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_serves_random_access(name):
    """Multistep solvers too: what is shared with the pipeline is the prediction, the step is steer's."""
    pipe, call = build("sd15")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **OPTIONS.get(name, {}))
    before = copy.deepcopy(vars(pipe.scheduler))
    process = steer.from_pipeline(pipe, steps=6, **call)
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    assert str(vars(pipe.scheduler)) == str(before)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_steps_have_the_schedulers_own_law(eta):
    """DDIM(eta) on SD1.5: the pipeline's own step with its noise replaced by 0 and by 1."""
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=5, transition=steer.ddim(eta), **call)
    x = process.prior(steer.Key(0), 1, 2)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(5)
    for k in range(5):
        output = process.denoiser.call.predict(x[0], (0,), 2, k)
        law = process.transition(x, process.denoise(x, k), k)
        for noise in (torch.zeros_like(x[0]), torch.ones_like(x[0])):
            # at eta = 0 diffusers takes no noise
            given = {"variance_noise": noise} if eta else {}
            theirs = scheduler.step(output, scheduler.timesteps[k], x[0], eta=eta, **given).prev_sample
            near(law.mean[0] + law.std * noise, theirs, 2e-5)


@pytest.mark.slow
def test_tiny_pipelines_depend_on_everything():
    """What the other tests compare moves with the state, the step and the prompt."""
    for name in ("sd15", "flux", "wan"):
        _, process = opened(name)
        pipe, call = build(name)
        other = steer.from_pipeline(pipe, steps=STEPS, **{**call, "prompt": "two dogs"})
        x = process.prior(steer.Key(0), 1, 2)
        a = process.denoiser.call.predict(x[0], (0,), 2, 1)
        b = process.denoiser.call.predict(x[0], (0,), 2, 2)
        c = other.denoiser.call.predict(x[0], (0,), 2, 1)
        assert min(float((a - b).abs().max()), float((a - c).abs().max()), float((a[0] - a[1]).abs().max())) > 1e-4
    assert tiny_pipelines.WIDTH == 32
