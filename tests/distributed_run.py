"""One rank of tests/test_distributed.py: `python distributed_run.py CASE RANK WORLD FOLDER`."""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from test_contract import METHODS, REWARD, mixture_process

import steer
from steer import search

torch.set_num_threads(1)


def runs():
    """Every method on mixtures, and hooks that draw and take gradients: name -> result."""
    found = {}
    for name, method in METHODS.items():
        budget = 120 if name.startswith(("depth_first", "noise")) else None
        options = {"budget": budget} if budget else {"particles": 5}
        found[name] = method(mixture_process(), REWARD, batch=2, key=5, **options)
    guided = steer.guide(mixture_process(), steer.dps(REWARD, 0.3) + steer.lgd(REWARD, 0.2, samples=2))
    found["hooks"] = steer.smc(guided, REWARD, particles=5, key=5, proposal=steer.guided(0.5))
    second = mixture_process().with_rule(steer.second_order())
    found["second order"] = steer.smc(second, REWARD, particles=5, key=5, proposal=steer.guided(0.5))
    found["second order, trees"] = search.dts(second, REWARD, particles=5, key=5)
    groupwise = functools.partial(search.best_of_n, particles=5, key=5)
    found["groupwise"] = groupwise(mixture_process(), Ranked())
    return found


def hooked():
    """A process whose predictions are journalled whole, so that ranks must begin at the same one."""
    return steer.guide(mixture_process(), steer.dps(REWARD, 0.3))


class Ranked:
    """A reward that depends on the group."""

    spec = steer.types.RewardSpec(scope="groupwise")

    def __call__(self, x):
        scores = REWARD(x)
        return scores - scores.mean()


def facts(result):
    """What must agree."""
    cost = result.cost
    numbers = torch.tensor([cost.nfe, cost.grads, cost.rewards, cost.decodes])
    return [result.x, result.reward, result.log_weight, result.log_evidence, numbers]


class Faulty:
    """A reward that does something at its third call."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == 3:
            self.what()
        return REWARD(x)


def fails():
    raise ValueError("disk is on fire")


FAULTS = {
    "fails": fails,
    "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def told(method, reward, key):
    """How a run under `together` ended."""
    try:
        with steer.distributed.together():
            result = method(mixture_process(), reward, budget=60, key=key)
        return ["interrupted" if result.interrupted else "finished", *facts(result)]
    except steer.SteerError as error:
        return [type(error).__name__, str(error), error.partial is not None]


def main(case, rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    out = Path(folder) / f"{case}-{rank}.pt"
    if case == "methods":
        with steer.distributed.together():
            found = {name: facts(result) for name, result in runs().items()}
        torch.save(found, out)
    elif case == "faults":
        for fault in FAULTS:
            for name, method in {"smc": steer.smc, "dts": search.dts, "rbf": search.rbf}.items():
                if fault == "killed" and name != "smc":
                    continue
                reward = Faulty(FAULTS[fault]) if rank == 1 else REWARD
                torch.save(told(method, reward, key=5), Path(folder) / f"{fault}-{name}-{rank}.pt")
            if fault == "interrupted":
                torch.save(told(steer.smc, REWARD, key=rank), Path(folder) / f"drifted-{rank}.pt")
    elif case == "snapshots":
        reward = Slow()
        with steer.distributed.together(), steer.resumable(f"{folder}/journal", every=0.0, checkpoint=0.0) as journal:
            result = steer.smc(mixture_process(), reward, particles=5, key=5, proposal=steer.guided(0.5))
        torch.save([*facts(result), journal.replayed + journal.recorded], out)
    elif case == "journal":
        reward = Slow()
        with steer.distributed.together(), steer.resumable(f"{folder}/journal", every=0.0):
            result = steer.smc(hooked(), reward, particles=5, key=5)
        torch.save([*facts(result), reward.calls], out)


class Slow:
    """A reward that gives time to kill."""

    calls = 0

    def __call__(self, x):
        time.sleep(0.1)
        self.calls += 1
        return REWARD(x)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    os._exit(0)  # not through gloo's own end, which at times aborts a process whose peer has died
