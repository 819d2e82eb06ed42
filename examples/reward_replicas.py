"""Replicas of a reward behind one address, by Ray Serve; `rewards.Remote` talks to them as to `steer serve-reward`.

    pip install "steer-diffusion[serve]" "ray[serve]"
    export STEER_REWARD_TOKEN=...          # of your own choice: all replicas and all clients know it
    python examples/reward_replicas.py clip:clip.safetensors --replicas 4 --gpus 1 --port 8000
    steer generate --reward remote:http://127.0.0.1:8000 ...

Each replica is a process that loads the reward once, on its share of a GPU, and scores up to --batch samples of
requests that wait there in one call. Ray sends a request to a replica with few under way, and starts again one that
dies; clients try its requests once more. Several rewards, as NAME=SPEC, are at http://127.0.0.1:8000/NAME.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from steer import rewards


def application(specs: list[str], *, token: str, batch: int) -> Callable[[], Any]:
    """A function that loads the rewards and makes their ASGI application; it is called in each replica.

    Args:
        specs: of rewards, as `steer serve-reward` takes them; several as NAME=SPEC.
        token: that clients must send.
        batch: samples of one call of a reward.
    """

    def build() -> Any:
        named = [spec.partition("=")[::2] for spec in specs]
        if len(specs) == 1 and not named[0][1]:
            return rewards.asgi(rewards.from_spec(specs[0]), token=token, batch=batch)
        return rewards.asgi({name: rewards.from_spec(spec) for name, spec in named}, token=token, batch=batch)

    return build


def deploy(specs: list[str], *, token: str, replicas: int, gpus: float, batch: int, host: str, port: int) -> None:
    """Starts the replicas; returns once they answer.

    Args:
        specs, token, batch: as in `application`.
        replicas: how many.
        gpus: of each replica; a fraction shares one.
        host, port: of the one address.
    """
    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    deployment = serve.deployment(
        serve.ingress(application(specs, token=token, batch=batch))(),
        name="rewards",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus},
        max_ongoing_requests=64,  # the places of a replica's queue
    )
    serve.run(deployment.bind(), name="rewards", route_prefix="/")


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", metavar="SPEC", help="clip:FILE, jpeg, ...; several as NAME=SPEC")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each replica")
    parser.add_argument("--batch", type=int, default=64, help="samples of one call of the reward")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = vars(parser.parse_args())
    deploy(args.pop("specs"), token=os.environ["STEER_REWARD_TOKEN"], **args)
    print(f"http://{args['host']}:{args['port']}", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
