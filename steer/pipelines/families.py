"""The names by which families of diffusers pipelines and schedulers are recognised: one table per decision.

A family that steer opens wrongly, or refuses, because it uses other names is added to these tables and nowhere else.
Each table says what it decides and what happens to a name that is missing.
"""

from __future__ import annotations

from typing import Any

# --- Noise levels: how a scheduler's own table is read ----------------------------------------------------------------
# The first six tables name a convention each. A scheduler in none of them is refused with a ModelError that names it.
# To add one: find out what its `sigmas` or `alphas_cumprod` hold, add its name to the table of that convention, and
# add the scheduler to SCHEDULERS of tests/pipelines/test_noise_levels.py, which compares with its own `step`.

FLOW_SCHEDULERS = ("FlowMatch", "LTXEulerAncestralRF")
"""Beginnings of class names. `sigmas` hold sigma of a flow, alpha + sigma = 1, and networks predict velocities.

Schedulers of any name with use_flow_sigmas=True have the same levels; their prediction type is in their config.
"""

SIGMA_SPACE_SCHEDULERS = ("EulerDiscrete", "EulerAncestral", "Heun", "LMS", "DPMSolverSDE", "EDM", "CosineDPM")
"""Beginnings of class names. `sigmas` hold the noise's standard deviation at alpha = 1; inputs are scaled."""

SIGMA_RATIO_SCHEDULERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPC", "DEIS", "SASolver")
"""Beginnings of class names. `sigmas` hold sigma / alpha, where alpha^2 + sigma^2 = 1."""

TIMESTEP_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
"""Whole class names, as other schedulers begin alike. `alphas_cumprod` at a timestep holds alpha^2."""

TRIGFLOW_SCHEDULERS = ("SCMScheduler",)
"""Whole class names. Timesteps are angles: alpha = cos, sigma = sigma_data sin; networks predict as in TrigFlow."""

COSINE_SCHEDULERS = ("DDPMWuerstchenScheduler",)
"""Whole class names. Timesteps are the continuous time of a cosine schedule (Wuerstchen, Stable Cascade)."""

EDM_SCHEDULERS = ("EDM", "CosineDPM")
"""Beginnings of class names, which are in SIGMA_SPACE_SCHEDULERS too. Networks are preconditioned as in EDM.

They are scaled by config.sigma_data and told log(sigma) / 4.
"""

CLIP_KEEPS_EPS_SCHEDULERS = ("DDIM",)
"""Beginnings of class names. With clip_sample these clip x_0 and keep eps as predicted; others clip the prediction."""

# --- Steps: what takes the place of a scheduler's own step ------------------------------------------------------------
# A scheduler in none of these tables is replaced by ancestral sampling, which one line to the log says.

RENOISING_SCHEDULERS = ("LCMScheduler", "SCMScheduler", "FlowMatchLCMScheduler")
"""Whole class names. Their step draws all noise anew around the prediction, as their networks are distilled for.

Flow schedulers with stochastic_sampling=True in their config do the same.
"""

TCD_SCHEDULERS = ("TCDScheduler",)
"""Whole class names. Their step goes along the prediction beyond the next timestep and is noised up to it."""

ANCESTRAL_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler")
"""Whole class names. Their own step is ancestral sampling, so nothing is replaced and no line is logged."""

ETA_SCHEDULERS = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", *TCD_SCHEDULERS)
"""Whole class names. The pipeline's argument `eta` sets their noise, and steer's rule follows it; others ignore it."""

TOKEN_SCHEDULERS = (
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "VQDiffusionScheduler",
)
"""Whole class names of schedulers that step tokens. Refused with a ModelError that names `steer.from_logits`."""

SCHEDULERS_OUTSIDE_LOOP = ("prior_scheduler", "image_noising_scheduler", "low_res_scheduler", "inverse_scheduler")
"""Names of a pipeline's other schedulers that its loop does not step by. One under another name is refused."""

# --- Bare UNets: pipelines of one network that are called directly ----------------------------------------------------
# A pipeline that fits neither table takes the general way, through its own call, which is slower and takes no labels.

BARE_UNETS = ("UNet2DModel",)
"""Whole class names of networks that `unet2d` calls."""

BARE_UNET_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
"""Whole class names of schedulers whose levels and clipping `unet2d` reads."""

# --- Parts of a pipeline ----------------------------------------------------------------------------------------------

METHODS_BEFORE_LOOP = (
    "encode_prompt",
    "encode_image",
    "prepare_latents",
    "prepare_image_latents",
    "prepare_mask_latents",
    "prepare_control_image",
    "prepare_image_embeds",
    "prepare_ip_adapter_image_embeds",
    "_get_t5_prompt_embeds",
)
"""Methods that a pipeline calls before its loop; each is computed once per batch of problems and remembered.

One that is missing is computed again in every evaluation, and what it draws may depend on the number of rows, which
`steer.verify` finds. States enter a loop by what "prepare_latents" returns; in a pipeline without such a method they
enter as the result of the step before.
"""

COMBINED_PIPELINES = frozenset({"prior_pipe", "decoder_pipe"})
"""The pipelines in a combined one (Kandinsky, Stable Cascade): the decoder's loop is steered, the prior runs first.

Pipelines that hold others under different names are refused with a ModelError that lists them.
"""

PARTS_OUTSIDE_LOOP = ("vae", "vqvae", "movq", "vqgan", "encoder", "checker", "vocoder", "projection")
"""Parts of the names of components that run before or after the loop; every other module counts as a network in it.

A new kind of decoder under another name would be counted as a network: add it here.
"""

# --- Arguments of a pipeline's call -----------------------------------------------------------------------------------

PROMPT_ARGUMENTS = ("prompt", "task_prompt")
"""Arguments that hold prompts, the first that is given counts: one problem each, and rewards get their texts."""

COUNTED_ARGUMENTS = ("prompt_embeds", "class_labels", "image_embeds", "image_embeddings")
"""Arguments whose length is the number of problems where there are no prompts; after them, "image" is."""

BATCHED_ARGUMENTS = ("prompt", "class_labels")
"""Arguments of which a longer list makes a larger batch, in pipelines without num_images_per_prompt or batch_size.

With none of these given, every row is a call of its own.
"""

PER_PROBLEM_ARGUMENTS = (
    *PROMPT_ARGUMENTS,
    "content_prompt",
    "negative_prompt",
    "pooled_prompt",
    "negative_pooled",
    "class_labels",
)
"""Beginnings of arguments with one entry per problem wherever there are as many entries as problems.

Arguments under other names are divided by what the pipeline does with them: see `several_problems.divide_arguments`.
"""

SHARED_ARGUMENTS = ("timesteps", "sigmas")
"""Arguments of all problems, however many entries they have: steps are the same for all."""


def name_begins(part: Any, table: tuple[str, ...]) -> bool:
    """Whether the class name of a scheduler or network begins with a name of the table."""
    return type(part).__name__.startswith(table)


def name_is_in(part: Any, table: tuple[str, ...]) -> bool:
    """Whether the whole class name of a scheduler or network is in the table."""
    return type(part).__name__ in table
