"""Rollouts in the form that trainers take: one file per trainer. No trainer is imported.

    to_flow_grpo, flow_grpo_settings            yifan123/flow_grpo
    to_verl_omni, verl_omni_settings            verl-project/verl-omni
    to_flow_factory, flow_factory_settings      X-GenGroup/Flow-Factory

Each converts a `steer.grpo.RolloutBatch` to tensors by the trainer's names, and to the entries of the trainer's
configuration under which its own formula gives the stored log-probs again, so that importance ratios start at 1.
Tables: docs/exporters.md.
"""

from .flow_factory import flow_factory_settings, to_flow_factory
from .flow_grpo import flow_grpo_settings, to_flow_grpo
from .verl_omni import to_verl_omni, verl_omni_settings

__all__ = [
    "flow_factory_settings",
    "flow_grpo_settings",
    "to_flow_factory",
    "to_flow_grpo",
    "to_verl_omni",
    "verl_omni_settings",
]
