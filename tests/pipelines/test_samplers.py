"""Samplers on opened pipelines: with and without gradients, on latents and on decoded pictures."""

import contextlib
import functools

import pytest
import torch
from tiny_pipelines import build

import steer
from steer import rewards, search

FAMILIES = ["sd15", "sdxl", "flux", "wan"]
RULES = {"sd15": steer.ddim(1.0), "sdxl": steer.ddim(1.0), "flux": steer.cps(0.7), "wan": steer.flow_sde(0.7)}


def brightness(samples):
    """Mean of pictures (M, C, H, W) or frames (M, F, C, H, W) in [0, 1], scaled to matter."""
    return 40.0 * samples.flatten(1).mean(1)


@pytest.fixture(scope="module")
def processes():
    made = {}
    for name in FAMILIES:
        pipe, call = build(name)
        made[name] = steer.from_pipeline(pipe, steps=5, transition=RULES[name], **call)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_smc_weighs_decoded_pictures(processes, name):
    process = processes[name]
    result = steer.smc(process, brightness, particles=4, key=1)
    assert result.x.shape == (1, 4, *process.event)
    assert result.cost.nfe == 4 * 5 * process.rows
    assert result.cost.decodes == result.cost.rewards == 4 * 6 - 4
    assert result.cost.grads == 0
    assert bool(result.log_evidence.isfinite().all())
    torch.testing.assert_close(result.log_weight.exp().sum(1), torch.ones(1, dtype=torch.float64))
    assert 0.0 <= float(result.decoded.min()) <= float(result.decoded.max()) <= 1.0


@pytest.mark.slow
def test_searching_for_several_prompts_is_reported(tmp_path):
    """As the README has it: one best image for each prompt, and the trees."""
    pipe, call = build("sd15")
    prompts = ["a red fox in snow", "a blue teapot", "a green bird"]
    process = steer.from_pipeline(pipe, steps=5, transition=RULES["sd15"], **call | {"prompt": prompts})
    result = search.dts_star(process, brightness, budget=60)
    assert (result.log_weight.exp() > 0).sum(1).tolist() == [1, 1, 1]
    page = result.report(tmp_path).read_text()
    assert page.count("<summary>") == 3
    assert all(f"<summary>{prompt}" in page for prompt in prompts)
    assert "How the best sample came about" in page


@pytest.mark.parametrize("name", FAMILIES)
def test_guided_smc_differentiates_the_whole_chain(processes, name):
    process = processes[name]
    result = steer.smc(process, brightness, particles=3, key=1, proposal=steer.guided())
    assert result.cost.grads > 0
    blind = steer.smc(process, brightness, particles=3, key=1)
    assert not torch.equal(result.x, blind.x)
    assert bool(result.reward.isfinite().all())


@pytest.mark.parametrize("name", FAMILIES)
def test_results_do_not_depend_on_chunks_but_for_rounding(name):
    pipe, call = build(name)
    whole, pieces = (steer.from_pipeline(pipe, steps=4, chunk=chunk, **call) for chunk in (16, 2))
    a, b = (steer.rollout(process, brightness, particles=5, key=3) for process in (whole, pieces))
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-4 * float(a.x.abs().max()))
    torch.testing.assert_close(a.reward, b.reward, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_moves_the_reward(processes, name):
    """A strong pull on the first latent channel raises it over the blind chain with the same noise."""

    def channel(latents):
        return latents.flatten(1).mean(1)

    pipe, call = build(name)
    process = steer.from_pipeline(pipe, steps=5, transition=RULES[name], output_type="latent", **call)
    options = {"particles": 4, "key": 2, "temperature": 0.01, "selection": steer.resample(threshold=0.0)}
    blind = steer.smc(process, channel, **options)
    pulled = steer.smc(process, channel, proposal=steer.guided(), **options)
    assert float(pulled.reward.mean()) > float(blind.reward.mean())


def test_two_prompts_run_as_two_problems(processes):
    pipe, call = build("sd15")
    seen = []

    def reward(samples, *, prompts):
        seen.append(prompts)
        return brightness(samples)

    process = steer.from_pipeline(pipe, steps=4, **{**call, "prompt": ["a cat", "two dogs"]})
    result = steer.smc(process, reward, particles=3, key=0)
    assert result.x.shape[:2] == (2, 3)
    assert seen[0] == ["a cat"] * 3 + ["two dogs"] * 3


@pytest.fixture(scope="module")
def clip():
    """CLIPScore by a random network of the real architecture, with a vocabulary of letters."""
    open_clip = pytest.importorskip("open_clip")

    def tokenizer(texts):
        rows = [[*(1 + ord(letter) % 30 for letter in text[:9]), 31] for text in texts]
        return torch.tensor([row + [0] * (10 - len(row)) for row in rows])

    torch.manual_seed(0)
    network = open_clip.CLIP(
        embed_dim=8,
        quick_gelu=True,
        vision_cfg={"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        text_cfg={"context_length": 10, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    )
    return rewards.CLIPScore(network, tokenizer=tokenizer, prefix="")


BUDGETS = {"rbf": 14, "particle_gibbs": 20, "driftlite": 20, "psi": 20}  # predictions; 10 for the others
GRADIENT = {
    "smc, guided": functools.partial(steer.smc, proposal=steer.guided()),
    "dts, guided": functools.partial(search.dts, proposal=steer.guided()),
}


# Every method on one family; on the others those that ask for different things: draws, weights, gradients, restarts.
KINDS = ["best_of_n", "smc", "dts", "rbf", "psi", "smc, guided"]
PAIRS = [(FAMILIES[0], method) for method in (*steer.methods(), *GRADIENT)]
PAIRS += [(name, method) for name in FAMILIES[1:] for method in KINDS]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_every_method_runs_with_a_clip_reward(processes, clip, name, method):
    """And keeps its contract: the budget, a cost that agrees with the networks, weights, the same again."""
    process = processes[name]
    reward = rewards.per_frame(clip, every=2) if name == "wan" else clip
    budget = BUDGETS.get(method, 10) * process.rows
    run = GRADIENT.get(method) or functools.partial(steer.sample, method=method)
    with rows_counted(process) as counted:
        result = run(process, reward, budget=budget, temperature=0.1, key=4)
    assert counted[0] == result.cost.nfe
    assert 0 < result.cost.nfe <= budget
    assert bool(result.reward.isfinite().all())
    torch.testing.assert_close(result.log_weight.exp().sum(1), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(
        result.reward[0],
        reward(result.decoded, prompts=["a cat"] * result.reward.shape[1]).double(),
        rtol=1e-3,
        atol=1e-4,
    )


@contextlib.contextmanager
def rows_counted(process):
    """Rows that the pipeline's own network runs on, stand-ins left out."""
    pipe, count = process.denoiser.call.user_pipe, [0]
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def count_rows(module, args, kwargs, output):
        count[0] += len(output[0])

    handle = network.register_forward_hook(count_rows, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def test_a_pipeline_runs_on_another_path_and_on_another_grid():
    """Converted from the sigma space of Euler to a flow, and on a finer grid: levels between those of the pipeline."""
    pipe, call = build("sdxl")
    process = steer.from_pipeline(pipe, steps=6, transition=steer.ode(), output_type="latent", **call)
    finer = process.with_times(
        [t for a, b in zip(process.times, process.times[1:], strict=False) for t in (a, 0.5 * (a + b))] + [0.0]
    )
    x = process.prior(steer.Key(0), 1, 2)

    def run(model, x):
        with torch.no_grad():
            for k in range(model.steps):
                x = model.transition(x, model.denoise(x, k), k).mean
        return x

    coarse, fine = run(process, x), run(finer, x)
    assert bool(fine.isfinite().all())
    flow = steer.convert(process, steer.RectifiedFlow())
    scale = (
        flow.levels[0].sigma
        / process.schedule(
            steer.schedules.time_at(process.schedule, steer.schedules.angle(flow.schedule, flow.times[0]))
        ).sigma
    )
    converted = run(flow, x * scale)
    size = float(coarse.abs().max())
    assert float((fine - coarse).abs().max()) < size
    assert float((converted - coarse).abs().max()) < size
