"""Values: what they estimate, what they cost, and that they can be learned."""

import pytest
import torch
from exact import Linear, mixture_2d
from torch import nn

import steer
from steer import search
from steer.core.objective import open_objective
from steer.search import values

REWARD = Linear([0.7, -0.5])


def process(steps=8, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64, **options
    )


def opened(chain, reward=REWARD):
    chain, objective, meter = open_objective(chain, reward)
    return chain, objective, meter


def states(chain, k, count=500):
    """States of the model's own chains at level k."""
    run = steer.rollout(chain, REWARD, particles=count, key=7)
    return run.trajectory.states()[:, :, k], run.reward


@pytest.mark.parametrize("count", [1, 3, 6, 50])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_a_look_ahead_counts_what_it_costs(count, k):
    chain, objective, meter = opened(process())
    value = values.look_ahead(count)
    x = chain.prior(steer.Key(0), 2, 3)
    scores = value(objective, x, k, chain.denoise(x, k))
    assert scores.shape == (2, 3)
    assert meter.nfe == 6 * (1 + value.extra(chain, k))
    assert value.extra(chain, k) <= min(count, 7 - k)
    assert meter.rewards == 6


def test_a_look_ahead_over_every_level_is_the_ode():
    chain, objective, _ = opened(process(transition=steer.ode()))
    x = chain.prior(steer.Key(0), 1, 5)
    scores = values.look_ahead(7)(objective, x, 0, chain.denoise(x, 0))
    rollout = steer.rollout(chain, REWARD, start=lambda *_: steer.Trajectory.begin(chain, x), particles=5)
    torch.testing.assert_close(scores, rollout.reward)


def test_looking_ahead_is_a_better_guess_and_x0_hat_the_plain_one():
    """The reward is far from linear over the mixture, so r(x0_hat) is a poor guess of E[r] at high noise."""

    def reward(x):
        return (x[:, 0] > 1.0).double()

    chain, objective, _ = opened(process(20), reward)
    run = steer.rollout(chain, reward, particles=2000, key=7)
    x = run.trajectory.states()[:, :, 6]
    x0 = chain.denoise(x, 6)
    plain, ahead = (value(objective, x, 6, x0) for value in (values.x0_hat(), values.look_ahead(4)))
    torch.testing.assert_close(plain, reward(x0[0])[None])
    assert (ahead - run.reward).square().mean() < (plain - run.reward).square().mean()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)).double()

    def forward(self, x, k):
        return self.body(torch.cat([x, k[:, None].double() / 8], 1))[:, 0]


def network():
    net = Net()
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            weight.copy_(0.3 * steer.Key(i).normal((1, 1, *weight.shape))[0, 0])
    return net


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_a_network_learns_the_value(temperature):
    """Linear reward on one Gaussian: E[r | x] = b x0_hat, and the soft value is that plus Var(r | x) / 2 T."""
    gaussian = steer.models.gaussian([0.5, 0.0], 0.5, steps=8, dtype=torch.float64)
    chain = gaussian.with_rule(steer.models.ExactStep(gaussian.reference))
    fitted = values.fit(
        chain, REWARD, network(), particles=3000, temperature=temperature, epochs=8, rate=5e-3, size=512, key=3
    )
    chain, objective, _ = opened(chain)
    for k in (2, 5, 7):
        x, _ = states(chain, k)
        level = chain.levels[k]
        left = 0.5 * level.sigma**2 / (level.alpha**2 * 0.5 + level.sigma**2)  # variance of x_0 given x
        truth = values.x0_hat()(objective, x, k, chain.denoise(x, k))
        truth = truth + (0.0 if temperature is None else 0.5 * left * (0.49 + 0.25) / temperature)
        with torch.no_grad():
            guess = fitted(objective, x, k, None)
        error = (guess - truth).square().mean().sqrt()
        assert error < 0.3 * REWARD(x[0]).std(), f"level {k}: {error}"
        assert abs((guess - truth).mean()) < 0.1, f"level {k}: {(guess - truth).mean()}"  # Var / 2 T is .26 at level 2


def test_training_is_a_function_of_the_key():
    def weights(key):
        net = network()
        before = torch.get_rng_state()
        values.fit(process(), REWARD, net, particles=50, epochs=1, key=key)
        assert torch.equal(torch.get_rng_state(), before)
        assert not net.training
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_learned_value_saves_predictions():
    learned = values.learned(lambda x, k: x @ REWARD.vector)
    result = search.svdd(process(), REWARD, particles=3, candidates=10, value=learned, batch=2)
    assert result.cost.nfe == 2 * 3 * 8
    assert result.cost.rewards == 2 * 3
    plain = steer.rollout(process(), REWARD, particles=3, batch=2)
    assert result.reward.mean() > plain.reward.mean()
    blocks = search.beam(
        process(), REWARD, particles=1, candidates=5, block=3, value=learned, select=search.selection.argmax()
    )
    # Levels 0 1 | 2 3 4 5 6 7 with five candidates, less the levels of choice 2 and 5, which cost one each.
    assert [seen.k for seen in blocks.seen] == [2, 5, 8]
    assert blocks.cost.nfe == 5 * 6 + 2
    assert search.svdd(process(), REWARD, value=learned, budget=50).cost.nfe == 48


def test_a_learned_value_of_wrong_shape_is_named():
    with pytest.raises(steer.ShapeError, match=r"one number per state, shape \(20,\)"):
        search.svdd(process(), REWARD, candidates=20, value=values.learned(lambda x, k: x))
    with pytest.raises(steer.SteerError, match="at least one prediction"):
        values.look_ahead(0)


def test_an_interrupted_search_with_learned_values_scores_its_predictions():
    def watch(event):
        if event.level == 3:
            raise steer.Stop

    learned = values.learned(lambda x, k: x @ REWARD.vector)
    result = search.svdd(process(), REWARD, particles=3, candidates=4, value=learned, on_step=watch)
    assert result.interrupted
    torch.testing.assert_close(result.reward, REWARD(result.x[0])[None])


def test_a_look_ahead_on_a_process_with_mean_hooks_is_the_same_as_without():
    """Its prediction is stacked with what the hooks add to the mean; an idle hook adds nothing."""
    idle = steer.guide(process(), steer.guidance.Hooks(mean=(lambda at: at.mean,)))
    for count in (1, 3):
        plain, hooked = (
            search.svdd(chain, REWARD, particles=4, candidates=2, value=values.look_ahead(count), key=3)
            for chain in (process(), idle)
        )
        torch.testing.assert_close(plain.x, hooked.x)
