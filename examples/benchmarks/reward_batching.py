"""Requests a second of a reward server, with and without scoring requests of several clients together.

    python examples/benchmarks/reward_batching.py [--clients 16] [--requests 20] [--out reward_batching.json]

The server runs in a process of its own. Its reward takes 20 ms a call, whatever the number of samples, as a network on
a GPU that is not full does. Every client, a thread, sends its requests of four pictures one after the other. That every
client gets its own samples' scores is checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from steer import rewards

PICTURES = 4
SERVER = """
import sys, time, torch
from steer import rewards
torch.set_num_threads(1)
calls = 0
def reward(samples):
    global calls
    calls += 1
    time.sleep(0.02)
    return samples.flatten(1)[:, 0] * 255
server = rewards.serve(reward, token="token", **eval(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.readline()
print(calls, flush=True)
"""


def measured(batch: int, clients: int, requests: int) -> dict[str, float]:
    """Requests a second, and calls of the reward."""
    command = [sys.executable, "-c", SERVER, repr({"batch": batch})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        remote = rewards.Remote(server.stdout.readline().strip(), token="token")

        def client(number: int) -> None:
            for i in range(requests):
                tags = (torch.arange(PICTURES) + number * requests + i) % 256
                images = (tags.float() / 255)[:, None, None, None].expand(-1, 3, 8, 8)
                assert torch.equal(remote(images).round(), tags.double())

        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        seconds = time.perf_counter() - began
        server.stdin.write("\n")
        server.stdin.flush()
        calls = int(server.stdout.readline())
        server.kill()
    return {"batch": batch, "requests_per_second": clients * requests / seconds, "seconds": seconds, "calls": calls}


def main() -> None:
    """Prints a line for each setting, and writes all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    parser.add_argument("--out", type=Path, default=Path("reward_batching.json"))
    args = parser.parse_args()
    found = [measured(batch, args.clients, args.requests) for batch in (1, 16, 64)]
    for each in found:
        print("batch {batch}: {requests_per_second:.0f} requests/s, {calls} calls of the reward".format(**each))
    args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
