"""The user's modules as they were found: what a pipeline's call changes in them is put back, however the call ends.

Pipelines change their own modules while they run, and change them back at the end: perturbed-attention guidance sets
other attention processors, SDXL moves its autoencoder to float32, an adapter's scale is multiplied in. steer ends most
calls halfway, and memory may run out anywhere, so the end is not where to rely on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class ModuleState(NamedTuple):
    """Modules at one moment: one entry per module, or per tensor for dtypes, in the order of `WatchedModules`."""

    processors: list[Any]
    dtypes: list[torch.dtype | None]
    hooks: list[tuple[str, ...]]
    adapter_scales: list[dict[str, float]]
    configs: list[Any]
    training: list[bool | None]


class WatchedModules:
    """Reads the state of modules and their submodules, and puts it back.

    Takes about a millisecond for 1,500 submodules, as every evaluation reads it: which submodules there are is found
    out once, and again where adapters were added.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self.modules = tuple(modules)
        self._adapters_known: list[Any] = []
        self._find()

    def read(self) -> ModuleState:
        """The state now."""
        if [_adapters(module) for module in self.modules] != self._adapters_known:
            self._find()
        return ModuleState(
            processors=[getattr(module, "processor", None) for module in self._attention],
            dtypes=[getattr(tensor, "dtype", None) for kept in self._tensors for tensor in kept.values()],
            # Those of diffusers, by name. Plain forward hooks stay: transformers adds its own at a module's first call.
            hooks=[
                () if (registry := own.get("_diffusers_hook")) is None else tuple(registry.hooks) for own in self._own
            ],
            adapter_scales=[dict(layer.scaling) for layer in self._adapter_layers],
            configs=[vars(module).get("_internal_dict") for module in self.modules],
            training=[own.get("training") for own in self._own],
        )

    def changes(self, before: ModuleState) -> list[str]:
        """Names of what differs from an earlier state: "processors", "dtypes", "hooks", ..."""
        now = self.read()
        return [name for name, one, other in zip(before._fields, before, now, strict=True) if one != other]

    def restore(self, before: ModuleState) -> None:
        """Put back what differs from an earlier state."""
        for name in self.changes(before):
            getattr(self, f"_restore_{name}")(getattr(before, name))

    @contextmanager
    def left_as_found(self) -> Iterator[None]:
        """Within this context the modules may be changed; on every way out they are as they were."""
        before = self.read()
        try:
            yield
        finally:
            self.restore(before)

    def answers(self) -> tuple[Any, ...]:
        """What changes where a module computes something else from the same input: weights, and adapters in use."""
        self.read()  # finds adapters that were added
        try:
            version = sum(tensor._version for kept in self._tensors for tensor in kept.values() if tensor is not None)
        except RuntimeError:  # weights made under inference_mode count no versions, and cannot be written to either
            version = 0
        layers = self._adapter_layers
        return version, [
            (layer.scaling.copy(), layer.active_adapter, layer.disable_adapters, layer.merged) for layer in layers
        ]

    def _find(self) -> None:
        """Find the submodules, and those of each kind."""
        every: list[Any] = list(dict.fromkeys(part for module in self.modules for part in module.modules()))
        self._own = [vars(module) for module in every]
        self._tensors = [kept for own in self._own for kept in (own["_parameters"], own["_buffers"]) if kept]
        self._attention = [module for module in every if getattr(module, "processor", None) is not None]
        self._adapter_layers: list[Any] = [module for module in every if isinstance(vars(module).get("scaling"), dict)]
        self._adapters_known = [_adapters(module) for module in self.modules]

    def _restore_processors(self, processors: list[Any]) -> None:
        for module, processor in zip(self._attention, processors, strict=True):
            if getattr(module, "processor", None) is not processor:
                module._modules.pop("processor", None)  # a module cannot be set in the place of an attribute
                vars(module).pop("processor", None)
                module.processor = processor

    def _restore_dtypes(self, dtypes: list[torch.dtype | None]) -> None:
        tensors = [tensor for kept in self._tensors for tensor in kept.values()]
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            if tensor is not None and dtype is not None and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)

    def _restore_hooks(self, names: list[tuple[str, ...]]) -> None:
        for own, before in zip(self._own, names, strict=True):
            if (registry := own.get("_diffusers_hook")) is not None:
                for name in set(registry.hooks) - set(before):
                    registry.remove_hook(name, recurse=False)

    def _restore_adapter_scales(self, scales: list[dict[str, float]]) -> None:
        for layer, scaling in zip(self._adapter_layers, scales, strict=True):
            layer.scaling.clear()
            layer.scaling.update(scaling)

    def _restore_configs(self, configs: list[Any]) -> None:
        for module, config in zip(self.modules, configs, strict=True):
            if config is not None:
                vars(module)["_internal_dict"] = config

    def _restore_training(self, training: list[bool | None]) -> None:
        for own, mode in zip(self._own, training, strict=True):
            if mode is not None:  # compiled modules have that of the module inside
                own["training"] = mode


def _adapters(module: Any) -> tuple[Any, ...]:
    """Names of the adapters in a module."""
    return tuple(getattr(module, "peft_config", ()))
