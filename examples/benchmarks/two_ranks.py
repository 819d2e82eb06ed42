"""One population over two processes: how much sooner is it there, and is it the same?

    python examples/benchmarks/two_ranks.py [--repeats 5] [--json two_ranks.json]

A convolutional network that takes about a tenth of a second for the population on one core, and everything else next to
nothing, steered by `steer.smc`. Two ranks of a gloo group, one thread each, stay up; in every repeat the first runs
the whole alone while the second waits, and then both run it under `steer.distributed.together()`. Printed are seconds
on the clock, whose ratio is the speed-up; seconds of CPU, whose ratio it would be if nobody else used the machine and
nobody waited; and what the ranks spent on agreement, waiting for each other included. On a machine that others use,
look at the best repeat and at the CPU. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import steer

PARTICLES, STEPS, SIDE, WIDTH = 16, 10, 32, 64


def process_and_calls() -> tuple[steer.GaussianProcess, list[float]]:
    """A process whose network dominates, and the seconds of each of its calls."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, WIDTH, 3, padding=1), torch.nn.SiLU()]
    for _ in range(4):
        layers += [torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1), torch.nn.SiLU()]
    network, calls = torch.nn.Sequential(*layers, torch.nn.Conv2d(WIDTH, 3, 3, padding=1)), []

    def eps(x: torch.Tensor, t: float) -> torch.Tensor:
        began = time.perf_counter()
        with torch.no_grad():
            found = network(x.flatten(0, 1)).view(x.shape)
        calls.append(time.perf_counter() - began)
        return found

    return steer.from_eps(eps, steer.VP(), STEPS, event=(3, SIDE, SIDE)), calls


def brightness(samples: torch.Tensor) -> torch.Tensor:
    """A reward that costs nothing."""
    return 5.0 * samples.flatten(1).mean(1)


def once(together: bool) -> dict[str, Any]:
    """A run of the whole population, alone or with the other rank: what it gave and took."""
    process, calls = process_and_calls()
    wall, cpu, agreement = time.perf_counter(), time.process_time(), 0.0
    if together:
        with steer.distributed.together() as ranks:
            result = steer.smc(process, brightness, particles=PARTICLES, key=1)
        agreement = ranks.seconds
    else:
        result = steer.smc(process, brightness, particles=PARTICLES, key=1)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "agreement": agreement}
    return {**took, "network": sum(calls), "calls": len(calls), "result": result}


def rank_main(repeats: int, out: str) -> None:
    """What each of the two ranks does; the first writes the numbers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = []
    for repeat in range(repeats + 1):
        dist.barrier()
        alone = once(together=False) if dist.get_rank() == 0 else None
        dist.barrier()
        shared = once(together=True)
        cpus: list[Any] = [None, None]
        dist.all_gather_object(cpus, shared["cpu"])
        if alone is None or repeat == 0:  # the first warms up
            continue
        one, two = alone.pop("result"), shared.pop("result")
        same = {name: torch.equal(getattr(one, name), getattr(two, name)) for name in ("x", "reward", "log_weight")}
        apart = float((one.x - two.x).abs().max())
        ledger = [(r.cost.nfe, r.cost.grads, r.cost.rewards, r.cost.decodes) for r in (one, two)]
        shared |= {"cpu": max(cpus), "cpu_both": sum(cpus)}
        found.append({"alone": alone, "shared": shared, "same": same, "apart": apart, "ledger": ledger})
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def start(repeats: int, out: Path) -> list[dict[str, Any]]:
    """Both ranks to their end, and the numbers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--repeats", str(repeats), "--rank-writes", str(out)]
    ranks = [subprocess.Popen(words, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a rank failed")
    return json.loads(out.read_text())


def main() -> None:
    """Prints the table; exits with 1 where results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--rank-writes", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_writes:
        rank_main(args.repeats, args.rank_writes)
        return
    out = args.json or Path(f"/tmp/two_ranks.{os.getpid()}.json")
    found = start(args.repeats, out)
    print("| | alone s | two ranks s | speed-up | alone CPU s | slower rank CPU s | both | by CPU | agreement s |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number, one in enumerate(found, 1):
        alone, shared = one["alone"], one["shared"]
        for what, values in ratios.items():
            values.append(alone[what] / shared[what])
        cells = [f"{alone['wall']:.2f}", f"{shared['wall']:.2f}", f"{ratios['wall'][-1]:.2f}", f"{alone['cpu']:.2f}"]
        cells += [f"{shared['cpu']:.2f}", f"{shared['cpu_both']:.2f}", f"{ratios['cpu'][-1]:.2f}"]
        print(f"| {number} | " + " | ".join(cells) + f" | {shared['agreement']:.2f} |")
    call = min(one["alone"]["network"] / one["alone"]["calls"] for one in found)
    share = statistics.median(one["alone"]["network"] / one["alone"]["wall"] for one in found)
    print(f"{1e3 * call:.0f} ms a call of the network for {PARTICLES} particles on one thread, {share:.0%} of the run")
    for what, values in ratios.items():
        print(f"speed-up by {what}: median {statistics.median(values):.2f}, best {max(values):.2f} of 2")
    same = all(all(one["same"].values()) and one["ledger"][0] == one["ledger"][1] for one in found)
    print("results and ledgers are the same, bit for bit" if same else f"they differ by {found[0]['apart']:.1e}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
