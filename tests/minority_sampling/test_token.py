"""MinorityPrompt's token on a tiny random CLIP text encoder and a tiny random UNet."""

import copy
import functools

import pytest
import torch
from tiny_pipelines import clip_encoder, conditional_unet

import steer
from steer.guidance import Hooks
from steer.minority_sampling import NewToken, minority, minority_prompt
from steer.minority_sampling.token import LearnedToken
from steer.processes import parameterization

END, PAD, WORD = 2, 1, 40


@functools.cache
def parts():
    """Encoder, UNet, and the ids of a prompt of three words, padded."""
    torch.manual_seed(0)
    encoder, unet = clip_encoder().eval().requires_grad_(False), conditional_unet().eval().requires_grad_(False)
    return encoder, unet, torch.tensor([[0, 10, 20, 30, END, PAD, PAD, PAD]])


def conditional(x, t, text):
    """E[x_0 | x, text] by the UNet, states (B, N, 4, 8, 8)."""

    def network(x, t):
        flat = x.flatten(0, 1)
        return parts()[1](flat, torch.tensor(999.0 * t), encoder_hidden_states=text).sample.view(x.shape)

    return parameterization.from_eps(network, steer.VP())(x, t)


def process(steps=8):
    token = new_token()
    plain = lambda x, t: conditional(x, t, token.encode_plain(x.shape[0] * x.shape[1]))  # noqa: E731
    return steer.from_denoiser(plain, steer.VP(), steps, event=(4, 8, 8))


def new_token(init=WORD):
    encoder, _, ids = parts()
    return NewToken.insert(encoder, ids, before=END, init=init)


def test_a_row_of_a_known_word_is_that_word():
    """The encoder's own output for the prompt with the word written out."""
    token, (encoder, _, _) = new_token(), parts()
    written = torch.tensor([[0, 10, 20, 30, WORD, END, PAD, PAD]])
    assert torch.equal(token.encode(token.initial[None]), encoder(written)[0])
    assert torch.equal(token.encode_plain(3)[2], encoder(token.plain)[0][0])
    assert token.ids.shape == token.plain.shape


def test_only_the_row_moves():
    """Gradients reach the row, one per sample; table and encoder are as they were, and no hook is left."""
    encoder, _, _ = parts()
    before = copy.deepcopy(encoder.state_dict())
    token = new_token(torch.zeros(32))
    rows = torch.zeros(2, 32, requires_grad=True)
    token.encode(rows)[0].sum().backward()
    assert rows.grad is not None
    assert rows.grad[0].abs().sum() > 0.0
    assert rows.grad[1].abs().sum() == 0.0
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.get_input_embeddings()._forward_hooks
    assert all(p.grad is None for p in encoder.parameters())


def losses(sign):
    """Loss before and after ten iterations, at the first level, over 4 particles; one draw of noise throughout."""
    hook = minority_prompt(new_token(), conditional, iterations=10, rate=0.05).x0[0]
    seen = []

    def fixed(step, x, rows, i):
        seen.append(LearnedToken.loss(hook, step, x, rows, 0))
        return sign * seen[-1]

    object.__setattr__(hook, "loss", fixed)
    guided = minority(process(), Hooks(x0=(hook,)))
    guided.denoise(guided.prior(steer.Key(0), 1, 4), 0)
    return seen[0].detach(), seen[-1].detach()


def test_the_token_raises_the_loss():
    """Every particle's; the mutant with the paper's sign of the loss and this file's sign of the step lowers it."""
    before, after = losses(1.0)
    assert (after > before).all()
    before, after = losses(-1.0)
    assert (after < before).all()


@pytest.mark.slow
def test_rows_and_gradients_are_counted_and_later_levels_are_plain():
    hooks = minority_prompt(new_token(), conditional, iterations=3, highest=0.2)
    base = process()
    acting = [k for k in range(8) if hooks.x0[0].acts(base, k)]
    assert 0 < len(acting) < 8
    result = steer.rollout(minority(base, hooks), lambda x: x.flatten(1).mean(1), particles=2)
    assert (result.cost.nfe, result.cost.grads) == (2 * (8 + 7 * len(acting)), 2 * 6 * len(acting))
    moved = {k for k, (mean, _) in result.process.log.table().items() if mean > 0.0}
    assert moved == set(acting)
    alone = steer.rollout(minority(base, hooks), lambda x: x.flatten(1).mean(1), particles=1)
    assert torch.allclose(alone.x[:, 0], result.x[:, 0], atol=1e-4)  # particles have rows of their own


def test_no_end_and_no_room_are_errors():
    encoder, _, ids = parts()
    with pytest.raises(steer.ModelError, match="hold the end token"):
        NewToken.insert(encoder, ids, before=999, init=WORD)
    with pytest.raises(steer.ModelError, match="fills all 5 places"):
        NewToken.insert(encoder, ids[:, :5], before=END, init=WORD)
