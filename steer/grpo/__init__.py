"""Rollouts for GRPO trainers: groups of samples with the densities that made them, and the functions an update needs.

batch = grpo.collect(process, reward, groups=8, group_size=16, key=0)
advantage = grpo.advantages(batch).value
for step in grpo.by_level(batch):
    new = grpo.log_prob(policy, batch, step, reduction="mean").log_prob
    loss = grpo.clipped_loss(new, step.of(batch.logp("mean")), step.of(advantage), mask=step.valid)
"""

from .batch import RolloutBatch
from .branching import branch
from .downsampling import keep
from .granular_rollouts import granular
from .group_advantages import Advantages, advantages, depth_advantages, group_moments
from .losses import clip_fraction, clipped_loss, kl
from .policy import PolicyStep, StepRows, by_level, log_prob, log_probs
from .rollouts import collect
from .weighted_rollouts import merged
from .windows import Window, every, first_half, per_row, sliding

__all__ = [
    "Advantages",
    "PolicyStep",
    "RolloutBatch",
    "StepRows",
    "Window",
    "advantages",
    "branch",
    "by_level",
    "clip_fraction",
    "clipped_loss",
    "collect",
    "depth_advantages",
    "every",
    "first_half",
    "granular",
    "group_moments",
    "keep",
    "kl",
    "log_prob",
    "log_probs",
    "merged",
    "per_row",
    "sliding",
]
