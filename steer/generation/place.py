"""Which of how many processes this is, as launchers say it by environment variables. No process group is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import SteerError


class Place(NamedTuple):
    """rank among world processes, and local: among those of this machine, which names the device."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place(shard: str | None = None, environment: Mapping[str, str] | None = None) -> Place:
    """This process's place: `shard`, else torchrun's and accelerate's, a SLURM array's, a SLURM step's, else alone.

    Args:
        shard: "i/n", the i-th of n from 0.
        environment: instead of `os.environ`.

    Raises:
        SteerError: for a shard that is not i/n, and a rank outside of its world.
    """
    has = os.environ if environment is None else environment
    if shard is not None:
        first, slash, rest = shard.partition("/")
        if not (slash and first.isdecimal() and rest.isdecimal()):
            raise SteerError(f"a shard is i/n, the i-th of n counted from 0, as in 0/4; got {shard!r}")
        found = Place(int(first), int(rest))
    elif "RANK" in has and "WORLD_SIZE" in has:
        found = Place(int(has["RANK"]), int(has["WORLD_SIZE"]), int(has.get("LOCAL_RANK", has["RANK"])))
    elif "SLURM_ARRAY_TASK_ID" in has:
        first = int(has.get("SLURM_ARRAY_TASK_MIN", 0))
        found = Place(int(has["SLURM_ARRAY_TASK_ID"]) - first, int(has.get("SLURM_ARRAY_TASK_COUNT", 1)))
    elif "SLURM_PROCID" in has and int(has.get("SLURM_NTASKS", 1)) > 1:
        found = Place(int(has["SLURM_PROCID"]), int(has["SLURM_NTASKS"]), int(has.get("SLURM_LOCALID", 0)))
    else:
        found = Place()
    if not 0 <= found.rank < found.world:
        raise SteerError(f"rank {found.rank} is not one of {found.world} counted from 0; set the launcher's variables")
    return found
