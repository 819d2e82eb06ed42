"""Guidance by five hooks: a process for every sampler, or a proposal that sequential Monte Carlo makes exact."""

from .cfg import adaptive, classifier_free, settled
from .density import delta_of, density_guidance, prior_guidance, quantile_of
from .guided_process import GuidedProcess, guide
from .hooks import AfterHook, Hook, Hooks, Log, StartHook, Step
from .langevin_corrector import corrector
from .object_presence import MissingObjects, missing_objects
from .proposal import Follow, follow
from .restart_sampling import RestartInterval, RestartProcess, recur, restart
from .training_free import constant, decreasing, dps, freedom, increasing, lgd, mpgd, native, tfg, ugd
from .tuning import Trial, Tuned, tune

__all__ = [
    "AfterHook",
    "Follow",
    "GuidedProcess",
    "Hook",
    "Hooks",
    "Log",
    "MissingObjects",
    "RestartInterval",
    "RestartProcess",
    "StartHook",
    "Step",
    "Trial",
    "Tuned",
    "adaptive",
    "classifier_free",
    "constant",
    "corrector",
    "decreasing",
    "delta_of",
    "density_guidance",
    "dps",
    "follow",
    "freedom",
    "guide",
    "increasing",
    "lgd",
    "missing_objects",
    "mpgd",
    "native",
    "prior_guidance",
    "quantile_of",
    "recur",
    "restart",
    "settled",
    "tfg",
    "tune",
    "ugd",
]
