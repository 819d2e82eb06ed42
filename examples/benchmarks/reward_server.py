"""What a reward server holds against clients that mean it no good.

    python examples/benchmarks/reward_server.py [--seconds 30] [--out reward_server.json]

The server runs in a process of its own with its defaults, four threads, and a reward that takes a tenth of a second.
First 500 connections without a token say one byte now and then: threads of the server, how many are still open in the
end, and the seconds that an honest client's request takes meanwhile. Then 64 requests at once, each a PNG file of 63 kB
that stands for 8000 x 2700 pixels: the greatest resident memory above that of the idle server, beside the bound that
`rewards.serve` documents. The clients leave after --seconds; what they did not wait for is not scored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import psutil
import torch

from steer import rewards

SERVER = """
import time, torch
from steer import rewards
torch.set_num_threads(1)
def reward(samples):
    time.sleep(0.1)
    return samples.flatten(1)[:, 0]
server = rewards.serve(reward, token="token", threads=4)
print(server.url, flush=True)
server.wait()
"""
BOUND = (1 << 30) + 256 * 300_000 + 4 * int(1.4 * (1 << 26))
"""Bytes that `rewards.serve` documents: memory, connections, and what the allocator keeps for four threads."""


def bomb(width: int = 8000, height: int = 2700) -> bytes:
    """A request with one black picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(height * (3 * width + 1)), 9))
    png = b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")
    header = json.dumps({"encoding": "png", "sizes": [len(png)], "prompts": None}).encode()
    return struct.pack(">I", len(header)) + header + png


def slow_connections(url: str, process: psutil.Process) -> dict[str, float]:
    """500 connections that send a header byte by byte, for 15 seconds."""
    parts = httpx.URL(url)
    remote = rewards.Remote(url, token="token")
    threads, held = process.num_threads(), []
    for _ in range(500):
        held.append(socket.create_connection((parts.host, parts.port or 80), timeout=5))
        with contextlib.suppress(OSError):
            held[-1].sendall(b"GET /spec HTTP/1.1\r\nX: ")
    began = time.monotonic()
    remote(torch.zeros(1, 3, 8, 8))
    found = {"request_seconds": time.monotonic() - began, "threads_more": process.num_threads() - threads}
    for _ in range(5):
        time.sleep(3)
        for each in held:
            with contextlib.suppress(OSError):
                each.sendall(b"a")
    found["open_in_the_end"] = len([each for each in process.net_connections() if each.status == "ESTABLISHED"])
    for each in held:
        each.close()
    return found


async def bombs(url: str, process: psutil.Process, seconds: float) -> dict[str, float]:
    """64 requests at once, and the memory of the server meanwhile."""
    idle = peak = process.memory_info().rss
    body, statuses = bomb(), []

    async def ask(client: httpx.AsyncClient) -> None:
        reply = await client.post(f"{url}/score", content=body, headers={"Authorization": "Bearer token"})
        statuses.append(reply.status_code)

    async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
        asked = [asyncio.create_task(ask(client)) for _ in range(64)]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(task.done() for task in asked):
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.02)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return {
        "request_bytes": len(body), "scored": len(statuses), "idle_mb": idle / 1e6, "peak_mb": peak / 1e6,
        "above_idle_mb": (peak - idle) / 1e6, "bound_mb": BOUND / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url, process = server.stdout.readline().strip(), psutil.Process(server.pid)
        found = {"slow": slow_connections(url, process)}
        found["bombs"] = asyncio.run(bombs(url, process, arguments.seconds))
    finally:
        server.kill()
    for part, numbers in found.items():
        print(part, *(f"{name}={number:.4g}" for name, number in numbers.items()), sep="  ")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
