"""Loops that do more than predict and step: they paste, keep parts aside, write in place, carry copies, run priors."""

import diffusers
import pytest
import torch
import toy_pipelines
from tiny_pipelines import build, near, prepared, steps_recorded
from tiny_pipelines import sd15 as make_sd15
from toy_pipelines import (
    FREE,
    PICTURE,
    CarriesCopies,
    Combined,
    DrawsWhatItPastes,
    HasPrior,
    KeepsAside,
    KeepsBefore,
    Loop,
    Mixes,
    Pastes,
    PastesInPlace,
    SeveralImages,
    StepsBranches,
    StepsTokens,
    StepsTwice,
    SwitchesClippingOff,
    Toy,
    ToyPrior,
    WritesInPlace,
    WritesInPlaceAlone,
    toy,
)

import steer


def opened(pipe, steps=4, **options):
    options = {"prompt": "", "generator": torch.Generator().manual_seed(0), **options}
    return steer.from_pipeline(pipe, steps=steps, transition=steer.ddim(0.0), **options)


def run(process, x):
    for k in range(process.steps):
        x = process.transition(x, process.denoise(x, k), k).mean
    return x


def whole_run(pipe, process, **call):
    """The plain pipeline's first latents through steer, against its output."""
    call = {"prompt": "", "num_inference_steps": process.steps, "generator": torch.Generator().manual_seed(0), **call}
    with steps_recorded(pipe) as seen:
        expected = pipe(**call)[0]
    first = seen[0][1][: 1 if "image" not in call else None].clone()
    near(process.decode(run(process, first[None])).reshape_as(expected), expected)


KINDS = {
    Loop: 2,
    Pastes: 2,
    PastesInPlace: 2,
    KeepsBefore: 2,
    DrawsWhatItPastes: 2,
    KeepsAside: 2,
    WritesInPlace: 4,
    WritesInPlaceAlone: 2,
    CarriesCopies: 2,
    SeveralImages: 2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_the_pipelines_own_whatever_it_does_between_steps(kind):
    pipe = toy(kind, KINDS[kind])
    process = opened(pipe)
    assert steer.verify(process, steps=4)[:3] == (4, 0.0, 0.0)
    whole_run(pipe, process)
    # Random access: any order, any batch, and what was asked before is of no consequence.
    x = process.prior(steer.Key(0), 1, 3)
    rows = [process.denoise(x[:, n : n + 1], 3) for n in range(3)]
    given = x.clone()
    process.denoise(x, 1)
    near(process.denoise(x, 3), torch.cat(rows, 1))
    near(process.decode(x)[1], process.decode(x[:, 1:2])[0])
    assert torch.equal(x, given)  # nothing wrote into the caller's states


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_between_steps(kind):
    """Against a directional difference, at the first level and at a later one, of the prediction and of the output."""
    process = opened(toy(kind, KINDS[kind]))
    x = process.prior(steer.Key(0), 1, 2)
    direction, weights = (torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for k in (0, 2):
        for value in (
            lambda y, k=k: (process.denoise(y, k) * weights).sum(),
            lambda y, k=k: process.decode(process.denoise(y, k)).double().square().sum(),
        ):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(value(leaf), leaf)
            with torch.no_grad():
                ahead, behind = (value(x + s * direction).double() for s in (1e-2, -1e-2))
            assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=2e-2)


def test_a_loop_that_switches_clipping_off():
    """Stable Cascade does, by an attribute of its scheduler's configuration."""
    pipe = toy(SwitchesClippingOff, scheduler=diffusers.DDIMScheduler(clip_sample=True))
    whole_run(pipe, opened(pipe))


def test_states_that_are_pasted_over_are_never_looked_at():
    process = opened(toy(Pastes))
    x = process.prior(steer.Key(0), 1, 2)
    other = torch.where(FREE, x, 7.0)
    for k in range(4):
        assert torch.equal(*(process.denoise(y, k)[:, :, FREE[0]] for y in (x, other)))
        assert torch.equal(process.denoise(other, k)[:, :, ~FREE[0]], other[:, :, ~FREE[0]])
    assert torch.equal(process.decode(x), process.decode(other))
    latents = opened(toy(Pastes), output_type="latent")
    assert torch.equal(latents.decode(other)[0][~FREE[0]], PICTURE[~FREE])  # undecoded, and pasted over all the same
    result = steer.rollout(process.with_rule(steer.ddim(1.0)), lambda x: x.mean((1, 2, 3)), particles=3)
    images = process.decode(result.x)
    assert torch.equal(images[:, ~FREE[0]], (0.05 * PICTURE).tanh()[~FREE].expand(3, -1))
    assert float(images[:, FREE[0]].std(0).min()) > 0.0


def test_between_two_levels_the_pasted_part_has_the_level_asked_for():
    process = opened(toy(Pastes))
    seen = []
    process.denoiser.call.owner.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    x = process.prior(steer.Key(0), 1, 1)
    for first, second in ((0, 1), (1, 2), (2, 3)):
        t = 0.7 * process.times[first] + 0.3 * process.times[second]
        process.denoiser(x, t)
        at = steer.schedules.level(process.schedule, t)
        known = at.alpha * PICTURE + at.sigma * process.denoiser.call.start  # the prelude's own draw
        near(seen[-1][~FREE], known[~FREE])
        near(seen[-1][FREE], x[0][FREE])


@pytest.mark.slow
def test_masks_belong_to_their_prompts():
    pipe = prepared(make_sd15(diffusers.StableDiffusionInpaintPipeline))
    pictures = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    masks = [(picture[:1] > 0.5).float() for picture in pictures[2:]]
    both = opened(pipe, prompt=["a cat", "two dogs"], image=pictures[:2], mask_image=masks)
    x = both.prior(steer.Key(0), 2, 3)
    for k in (0, 2):
        together = both.denoise(x, k)
        for b, prompt in enumerate(("a cat", "two dogs")):
            alone = opened(pipe, prompt=prompt, image=pictures[b][None], mask_image=masks[b][None])
            near(together[b], alone.denoise(x[b : b + 1], k)[0])
            near(both.only(b).denoise(x[b : b + 1], k), alone.denoise(x[b : b + 1], k))


@pytest.mark.parametrize("steps", [1, 4])
def test_inpainting_of_stable_diffusion_is_the_pipelines(steps):
    pipe = prepared(make_sd15(diffusers.StableDiffusionInpaintPipeline))
    call = {"prompt": "a cat", "image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    call |= {"mask_image": (call["image"][:, :1] > 0.5).float(), "guidance_scale": 5.0}
    process = opened(pipe, steps, **call)
    assert steer.verify(process)[:3] == (steps, 0.0, 0.0)  # all of them: the loop ends otherwise than it goes on
    whole_run(pipe, process, **call, output_type="pt", return_dict=False)
    solver = steer.own_solver(process)
    found = steer.rollout(solver, lambda x: x.mean((1, 2, 3)), particles=2, key=3)
    near(solver.decode(found.x), process.decode(run(process, process.prior(steer.Key(3), 1, 2))), 1.0)


def test_a_first_frame_that_is_kept_aside():
    """LTX steps all frames but the first, which is the image."""
    pipe, call = build("ltx")
    pipe = prepared(diffusers.LTXImageToVideoPipeline(**pipe.components))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    process = opened(pipe, **call, image=image)
    assert process.event == (8, 2, 8, 8)
    assert steer.verify(process, steps=4)[:3] == (4, 0.0, 0.0)
    whole_run(pipe, process, **call, image=image, output_type="pt", return_dict=False)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Mixes, "Mixes changes the latents between its steps"),
        (StepsTwice, "scheduler.step twice in a step"),
        (StepsBranches, "not as copies"),
        (StepsTokens, "one timestep per token"),
    ],
)
def test_what_is_no_step_of_a_law_is_refused_in_words(kind, says):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if kind is StepsTokens else None
    for steps in (1, 4) if kind is not Mixes else (4,):  # what would follow a single step is the decoder's
        with pytest.raises(steer.ModelError, match=says):
            opened(toy(kind, scheduler=scheduler), steps)


def test_a_mask_that_keeps_everything_is_refused(monkeypatch):
    monkeypatch.setattr(toy_pipelines, "FREE", torch.zeros_like(FREE))
    with pytest.raises(steer.ModelError, match="keeps everything"):
        opened(toy(Pastes))


# --- priors ----------------------------------------------------------------------------------------------------------


def test_a_prior_runs_once():
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = prepared(HasPrior(Toy(), scheduler, ToyPrior(), diffusers.DDIMScheduler()))
    before = str(vars(pipe.prior_scheduler))
    process = opened(pipe)
    x = process.prior(steer.Key(0), 1, 2)
    process.denoise(x, 1)
    calls = pipe.prior.calls
    process.denoise(x, 2)
    process.decode(x)
    assert pipe.prior.calls == calls
    assert str(vars(pipe.prior_scheduler)) == before
    assert steer.verify(process, steps=4)[:3] == (4, 0.0, 0.0)
    whole_run(pipe, process)


def test_a_combined_pipeline_is_opened_at_its_decoder():
    torch.manual_seed(0)
    schedulers = (diffusers.DDIMScheduler(clip_sample=False) for _ in range(2))
    pipe = Combined(Toy(), next(schedulers), Toy(), next(schedulers))
    prepared(pipe)
    inner = {name: vars(pipe)[name] for name in ("prior_pipe", "decoder_pipe")}
    before = [str(vars(part.scheduler)) for part in inner.values()]
    process = opened(pipe)
    assert steer.verify(process, steps=4)[:3] == (4, 0.0, 0.0)
    x = process.prior(steer.Key(0), 1, 3)
    calls = pipe.prior_pipe.unet.calls
    near(process.denoise(x, 2)[:, 1:2], process.denoise(x[:, 1:2], 2))
    assert pipe.prior_pipe.unet.calls == calls
    assert all(vars(pipe)[name] is part for name, part in inner.items())
    assert [str(vars(part.scheduler)) for part in inner.values()] == before
    whole_run(pipe, process)
    with pytest.raises(steer.ModelError, match=r"its prior's; open pipe\.decoder_pipe"):
        opened(pipe, latents=torch.zeros(1, 2, 4, 4))
