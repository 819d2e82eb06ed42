"""What reports and saved files read of a run. `steer.Result` is one; so is anything else with these attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..core.method_choice import MethodChoice
from ..core.temperature import TemperatureChoice
from ..core.trajectory import LevelRecord, Trajectory
from ..cost import Cost
from ..key import Key
from ..types import ReverseProcess


class RunResult(Protocol):
    """A weighted population of B problems with N particles each, as `steer.Result` documents it."""

    @property
    def process(self) -> ReverseProcess: ...

    @property
    def x(self) -> Tensor: ...

    @property
    def reward(self) -> Tensor: ...

    @property
    def log_weight(self) -> Tensor: ...

    @property
    def log_evidence(self) -> Tensor: ...

    @property
    def log_evidence_variance(self) -> Tensor: ...

    @property
    def root(self) -> Tensor: ...

    @property
    def key(self) -> Key: ...

    @property
    def cost(self) -> Cost: ...

    @property
    def temperature(self) -> float: ...

    @property
    def temperature_choice(self) -> TemperatureChoice | None: ...

    @property
    def method_choice(self) -> MethodChoice | None: ...

    @property
    def trajectory(self) -> Trajectory | None: ...

    @property
    def law(self) -> str: ...

    @property
    def seen(self) -> Sequence[LevelRecord]: ...

    @property
    def interrupted(self) -> bool: ...

    @property
    def tree(self) -> Any: ...

    @property
    def made_by(self) -> Any:
        """A named tuple: the method, the reward, and the reward's unit and version."""
        ...

    @property
    def ess(self) -> Tensor: ...

    @property
    def pareto_k(self) -> Tensor: ...

    @property
    def diagnostics(self) -> Mapping[str, Tensor]: ...

    @property
    def decoded(self) -> Tensor: ...

    @property
    def texts(self) -> list[str]: ...

    def ranked(self) -> Tensor: ...

    def take(self, index: Tensor) -> RunResult: ...
