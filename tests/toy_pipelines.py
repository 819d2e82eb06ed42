"""The least that a diffusers pipeline is, and loops that do what some family does otherwise."""

import functools

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from tiny_pipelines import prepared

PICTURE = torch.linspace(-1.0, 1.0, 32).view(1, 2, 4, 4)
FREE = (torch.arange(16).view(4, 4) % 3 > 0).expand(1, 2, 4, 4)


class Toy(torch.nn.Module):
    """A network that sees every pixel, its neighbours, and the timestep."""

    calls, device, dtype = 0, torch.device("cpu"), torch.float32

    def __init__(self, channels=2):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, x, t):
        self.calls += 1
        return torch.tanh(self.conv(x)) * (1.0 + t / 1000.0)


class Loop(diffusers.DiffusionPipeline):
    """The least that a pipeline is; what a family does otherwise is overridden below."""

    interrupt = property(lambda self: getattr(self, "_interrupt", False))
    scheduler_kind = functools.partial(diffusers.DDIMScheduler, clip_sample=False)

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def prepare_latents(self, rows, generator):
        return randn_tensor((rows, 2, 4, 4), generator=generator)

    def body(self, i, t, latents, generator):
        output = self.unet(latents, t)
        return self.between(i, self.scheduler.step(output, t, latents, return_dict=False)[0], latents, generator)

    def between(self, i, latents, before, generator):
        return latents

    def decoded(self, latents):
        return (0.05 * latents).tanh()

    @torch.no_grad()
    def __call__(
        self, prompt, num_images_per_prompt=1, num_inference_steps=4, generator=None, output_type="pt", return_dict=True
    ):
        rows = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.start(rows, generator)
        for i, t in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            latents = self.body(i, t, latents, generator)
        return (latents if output_type == "latent" else self.decoded(latents),)

    def start(self, rows, generator):
        latents = self.prepare_latents(rows, generator)
        self.noise = latents.clone()
        return latents


class Pastes(Loop):
    """Inpainting: the known part at the next level, noised by what the loop started from."""

    def between(self, i, latents, before, generator):
        steps = self.scheduler.timesteps
        known = PICTURE if i + 1 == len(steps) else self.scheduler.add_noise(PICTURE, self.noise, steps[i + 1][None])
        return torch.where(FREE, latents, known)


class PastesInPlace(Pastes):
    """The same into the step's own tensor, by a scheduler that looks its level up by its counter."""

    scheduler_kind = diffusers.EulerDiscreteScheduler

    def start(self, rows, generator):
        self.scheduler.set_begin_index(0)
        return super().start(rows, generator)

    def between(self, i, latents, before, generator):
        known = super().between(i, torch.zeros_like(latents), before, generator)
        latents[:, ~FREE[0]] = known[:, ~FREE[0]]
        return latents


class KeepsBefore(Loop):
    """DeepFloyd IF: the known part is never noised, and is whatever it was before the step; no prepare_latents."""

    prepare_latents = None

    def start(self, rows, generator):
        return torch.where(FREE, randn_tensor((rows, 2, 4, 4), generator=generator), PICTURE)

    def between(self, i, latents, before, generator):
        return torch.where(FREE, latents, before)


del KeepsBefore.prepare_latents  # pipelines are asked whether they have one


class DrawsWhatItPastes(Loop):
    """Noise of its own in every step: steps that are skipped would leave it elsewhere in its random numbers."""

    def between(self, i, latents, before, generator):
        return torch.where(FREE, latents, PICTURE + 0.1 * randn_tensor(latents[:1].shape, generator=generator))


class KeepsAside(Loop):
    """LTX image-to-video: the networks see a first part that the scheduler does not step."""

    def prepare_latents(self, rows, generator):
        return torch.cat([PICTURE[:, :, :1].repeat(rows, 1, 1, 1), randn_tensor((rows, 2, 3, 4), generator)], 2)

    def body(self, i, t, latents, generator):
        output = self.unet(latents, t)[:, :, 1:]
        stepped = self.scheduler.step(output, t, latents[:, :, 1:], return_dict=False)[0]
        return torch.cat([latents[:, :, :1], stepped], 2)


class WritesInPlace(Loop):
    """Kandinsky 5: latents and image side by side in one tensor, of which each step overwrites the latents."""

    def prepare_latents(self, rows, generator):
        latents = randn_tensor((rows, 2, 4, 4), generator)
        return torch.cat([latents, PICTURE.repeat(rows, 1, 1, 1)], 1)

    def body(self, i, t, latents, generator):
        latents[:, :2] = self.scheduler.step(self.unet(latents, t), t, latents[:, :2], return_dict=False)[0]
        return latents

    def decoded(self, latents):
        return (0.05 * latents[:, :2]).tanh()


class WritesInPlaceAlone(Loop):
    """The same, without an image."""

    def body(self, i, t, latents, generator):
        latents[:] = self.scheduler.step(self.unet(latents, t), t, latents, return_dict=False)[0]
        return latents

    def decoded(self, latents):
        latents *= 0.05
        return latents.tanh()


class CarriesCopies(Loop):
    """DiT: latents twice in a batch, once per guidance branch, also for the scheduler."""

    def start(self, rows, generator):
        return torch.cat([randn_tensor((rows, 2, 4, 4), generator)] * 2)

    def body(self, i, t, latents, generator):
        half = latents[: len(latents) // 2]
        one, two = self.unet(torch.cat([half, half + 1.0]), t).chunk(2)
        guided = two + 3.0 * (one - two)
        return self.scheduler.step(torch.cat([guided, guided]), t, torch.cat([half, half]), return_dict=False)[0]

    def decoded(self, latents):
        return (0.05 * latents.chunk(2)[0]).tanh()


class SeveralImages(Loop):
    """Marigold: several images of each state, one after another."""

    def decoded(self, latents):
        return torch.stack([0.05 * latents, -0.1 * latents], 1).flatten(0, 1).tanh()


class SwitchesClippingOff(Loop):
    def start(self, rows, generator):
        self.scheduler.config.clip_sample = False
        return super().start(rows, generator)


class Mixes(Loop):
    def between(self, i, latents, before, generator):
        return 0.9 * latents + 0.1 * before


class StepsTwice(Loop):
    def body(self, i, t, latents, generator):
        clean = self.scheduler.step(self.unet(latents, t), t, latents, return_dict=False)[1]
        return self.scheduler.step(0.5 * clean, t, latents, return_dict=False)[0]


class StepsBranches(CarriesCopies):
    def body(self, i, t, latents, generator):
        output = self.unet(latents, t)
        output[len(output) // 2 :] += 1.0
        return self.scheduler.step(output, t, latents, return_dict=False)[0]


class StepsTokens(Loop):
    """LTX with conditions: a timestep per token, and the velocity with the other sign."""

    def body(self, i, t, latents, generator):
        return self.scheduler.step(
            -self.unet(latents, t), t, latents, per_token_timesteps=t.expand(len(latents), 2), return_dict=False
        )[0]


class ToyPrior(Toy):
    def forward(self, x, t):
        return [super().forward(x, t)]


class HasPrior(Loop):
    """StableUnCLIP: a loop of its own, by a scheduler of its own, before the one that counts."""

    def __init__(self, unet, scheduler, prior, prior_scheduler):
        super().__init__(unet, scheduler)
        self.register_modules(prior=prior, prior_scheduler=prior_scheduler)

    def start(self, rows, generator):
        latents = randn_tensor((1, 2, 3, 3), generator=generator)
        self.prior_scheduler.set_timesteps(3)
        for t in self.prior_scheduler.timesteps:
            output = self.prior(latents, t)
            latents = self.prior_scheduler.step(output[0], t, latents, return_dict=False)[0]
            output[0] = None  # adapters scale their lists in place
        self.shift = latents.mean()
        return super().start(rows, generator)

    def body(self, i, t, latents, generator):
        output = self.unet(latents + self.shift, t)
        return self.scheduler.step(output, t, latents, return_dict=False)[0]


class Prior(Loop):
    """A pipeline whose samples another takes."""


class Decodes(Loop):
    def __call__(self, shift, **call):
        self.shift = shift
        return super().__call__(prompt=["" for _ in shift], **call)

    def body(self, i, t, latents, generator):
        output = self.unet(latents + self.shift, t)
        return self.scheduler.step(output, t, latents, return_dict=False)[0]


class Combined(diffusers.DiffusionPipeline):
    """Kandinsky 2.2 and Stable Cascade in one object."""

    def __init__(self, unet, scheduler, prior_unet, prior_scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, prior_unet=prior_unet, prior_scheduler=prior_scheduler)
        self.prior_pipe, self.decoder_pipe = Prior(prior_unet, prior_scheduler), Decodes(unet, scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, latents=None, output_type="pt"):
        shift = self.prior_pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent")[0]
        return self.decoder_pipe(
            shift, num_inference_steps=num_inference_steps, generator=generator, output_type=output_type
        )


def toy(kind, channels=2, scheduler=None):
    torch.manual_seed(0)
    return prepared(kind(Toy(channels), scheduler or kind.scheduler_kind()))
