"""Runs that are killed at one of their calls, for the tests of journals and snapshots."""

from dataclasses import replace

from test_contract import REWARD


def on_network(process, change):
    """The process with a changed network."""
    if hasattr(process, "around"):  # its steps remember
        return process.around(lambda base: on_network(base, change))
    name = "network" if hasattr(process, "network") else "denoiser"
    return replace(process, **{name: change(getattr(process, name))})


class Killed(BaseException):
    """What a SIGKILL leaves of a run: nothing catches it."""


class Paid:
    """Counts calls of network and reward, and dies at one of them."""

    def __init__(self, process, reward=REWARD, dies_at=None):
        self.calls, self.dies_at, self.reward = 0, dies_at, reward
        self.process = on_network(process, self.counted)

    def count(self):
        self.calls += 1
        if self.calls == self.dies_at:
            raise Killed

    def counted(self, network):
        """The network, counting."""

        def call(*args):
            self.count()
            return network(*args)

        return call

    def __call__(self, x):
        self.count()
        return self.reward(x)


def counts(result):
    return result.cost.nfe, result.cost.grads, result.cost.rewards, result.cost.decodes
