"""`steer serve-reward`: rewards over HTTP."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .console import say
from .flags import (
    Debug,
)
from .inputs import (
    reported_errors,
    rewards_by_name,
)


def serve_reward(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="Reward to serve: digit:3, clip, jpeg, ...; several as NAME=SPEC."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on, of IPv4 or IPv6. 127.0.0.1 and ::1 are this machine alone.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the token clients must send; default: one made up, printed."
        ),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Serve without a token, on this machine alone.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Requests held at once; more are rejected, to be retried.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Concurrent calls of the rewards.")] = 1,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Samples of one call of a reward, over requests that wait together; 1: a call for each."
        ),
    ] = 1,
    memory: Annotated[int, typer.Option(min=1, help="MiB that all requests hold together.")] = 1024,
    debug: Debug = False,
) -> None:
    """Serves rewards over HTTP, for --reward remote:URL and rewards.Remote, until Ctrl-C.

    Prints each reward's address, and the token. Clients on the command line send the token in STEER_REWARD_TOKEN.
    """
    from .. import rewards
    from ..errors import RewardError

    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise typer.BadParameter(f"the environment variable {token_env} is not set", param_hint="--token-env")
    if token and no_token:
        raise typer.BadParameter("give --token-env or --no-token, not both", param_hint="--no-token")
    with reported_errors(debug, as_json=False):
        served = rewards_by_name(specs)
        try:
            server = rewards.serve(
                served if len(served) > 1 else next(iter(served.values())),
                host=host,
                port=port,
                token=False if no_token else token,
                queue=queue,
                threads=threads,
                batch=batch,
                memory=memory << 20,
            )
        except RewardError as error:
            raise typer.BadParameter(str(error), param_hint="--host") from error
    with server:
        for name in served:
            typer.echo(f"{server.url}/{name}" if len(served) > 1 else server.url)
        if token is None and server.token:
            typer.echo(f"STEER_REWARD_TOKEN={server.token}")
        try:
            server.wait()
        except KeyboardInterrupt:
            say("stopped")
