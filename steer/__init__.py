"""steer: inference-time reward alignment of frozen diffusion and flow models."""

from importlib import import_module
from pathlib import Path
from typing import Any

# In a checkout that is on the path but not installed, the folders of steer.rewards and steer.search stand beside this.
# Before the imports below, or those of steer.rewards find another, installed one.
if not (Path(__file__).parent / "search").exists():
    __path__.append(str(Path(__file__).parent.parent))

from . import exporters, grpo, guidance, models
from .core import resampling as resamplers
from .core.resampling import killing, multinomial, residual, ssp, stratified, systematic
from .core.snapshot import load_trajectory, save_trajectory
from .core.start import prior
from .core.trajectory import Trajectory
from .cost import Cost
from .errors import (
    BudgetError,
    CollapsedWeightsError,
    DistributedError,
    JournalError,
    ModelError,
    NonFiniteError,
    NotDifferentiableError,
    NotStochasticError,
    PromptError,
    RemoteError,
    RewardError,
    RunDirectoryError,
    ShapeError,
    StateSpaceError,
    SteerError,
)
from .evaluation.compare import compare
from .evaluation.methods import methods, sample
from .evaluation.preflight import Preflight, preflight
from .execution import distributed
from .execution.journal import resumable
from .execution.progress_bar import progress
from .generation.generator import Generator
from .guidance import (
    GuidedProcess,
    Hooks,
    classifier_free,
    density_guidance,
    dps,
    follow,
    freedom,
    guide,
    lgd,
    missing_objects,
    mpgd,
    native,
    prior_guidance,
    recur,
    restart,
    tfg,
    ugd,
)
from .key import Key
from .minority_sampling import (
    NewToken,
    agreed_rarity,
    boost_and_skip,
    minority,
    minority_guidance,
    minority_metrics,
    minority_prompt,
    minority_score,
    quantile_labels,
    self_guided,
)
from .models.embedded import load
from .particles import potentials, proposals
from .particles.birth_death import BirthDeath, birth_death
from .particles.black_box_starts import elliptical_slice, pcn
from .particles.langevin import mala, pcnl, ula
from .particles.path_mcmc import path_moves
from .particles.potentials import difference, final_only, maximum, total
from .particles.proposals import bootstrap, guided, twisted
from .particles.selection import resample
from .particles.tempering import adaptive_tempering, geometric_tempering, snr_share
from .particles.top_k import top_k_of_n
from .pipelines.from_pipeline import from_pipeline
from .pipelines.hub import from_hub
from .pipelines.latents import from_latents
from .pipelines.native_solver import own_solver
from .pipelines.verification import verify
from .processes import schedules
from .processes import transitions as rules
from .processes.clipping import dynamic_clip
from .processes.conversion import convert
from .processes.edm import from_edm, karras_sigmas
from .processes.from_network import from_denoiser, from_eps, from_score, from_v, from_velocity
from .processes.gaussian import GaussianProcess
from .processes.masked import MaskedProcess, from_logits
from .processes.optimal_times import optimal_times
from .processes.schedules import VE, VP, Cosine, RectifiedFlow, Tabulated, log_snr_times, sigma_times, uniform_times
from .processes.second_order import second_order
from .processes.switched import switched
from .processes.transitions import Normal, churn, cps, dance_sde, ddim, euler_maruyama, flow_sde, ode
from .processes.unmasking import Unmasking, unmask
from .results.result import Result
from .samplers.das import das
from .samplers.driftlite import driftlite
from .samplers.fk_steering import fk_steering
from .samplers.fkc import fkc
from .samplers.importance_sampling import importance_sampling
from .samplers.particle_gibbs import draw_path, particle_gibbs
from .samplers.psi import psi
from .samplers.rollout import rollout
from .samplers.smc import smc
from .samplers.tds import tds
from .samplers.waste_free import waste_free
from .saved import load_run
from .types import Coeffs, Denoiser, Level, QuadraticForm, ReverseProcess, Reward, Rule, Schedule, Stop, Transition
from .version import __version__
from .watching import trackers
from .watching.live_preview import preview
from .weighted_sde import transports
from .weighted_sde.composite import Composite, compose
from .weighted_sde.engine import FeynmanKac, KernelRatio
from .weighted_sde.look_ahead import LookAhead, at_state, flow_map, ode_steps, x0_hat
from .weighted_sde.transports import (
    Transport,
    base_transport,
    ecg,
    flow_transport,
    half_transport,
    score_transport,
    vcg,
)


def __getattr__(name: str) -> Any:
    """`steer.rewards` and `steer.search`, imported when they are first asked for."""
    if name in ("rewards", "search"):
        return import_module(f"steer.{name}")
    raise AttributeError(f"module 'steer' has no attribute {name!r}")


__all__ = [
    "VE",
    "VP",
    "BirthDeath",
    "BudgetError",
    "Coeffs",
    "CollapsedWeightsError",
    "Composite",
    "Cosine",
    "Cost",
    "Denoiser",
    "DistributedError",
    "FeynmanKac",
    "GaussianProcess",
    "Generator",
    "GuidedProcess",
    "Hooks",
    "JournalError",
    "KernelRatio",
    "Key",
    "Level",
    "LookAhead",
    "MaskedProcess",
    "ModelError",
    "NewToken",
    "NonFiniteError",
    "Normal",
    "NotDifferentiableError",
    "NotStochasticError",
    "Preflight",
    "PromptError",
    "QuadraticForm",
    "RectifiedFlow",
    "RemoteError",
    "Result",
    "ReverseProcess",
    "Reward",
    "RewardError",
    "Rule",
    "RunDirectoryError",
    "Schedule",
    "ShapeError",
    "StateSpaceError",
    "SteerError",
    "Stop",
    "Tabulated",
    "Trajectory",
    "Transition",
    "Transport",
    "Unmasking",
    "__version__",
    "adaptive_tempering",
    "agreed_rarity",
    "at_state",
    "base_transport",
    "birth_death",
    "boost_and_skip",
    "bootstrap",
    "churn",
    "classifier_free",
    "compare",
    "compose",
    "convert",
    "cps",
    "dance_sde",
    "das",
    "ddim",
    "density_guidance",
    "difference",
    "distributed",
    "dps",
    "draw_path",
    "driftlite",
    "dynamic_clip",
    "ecg",
    "elliptical_slice",
    "euler_maruyama",
    "exporters",
    "final_only",
    "fk_steering",
    "fkc",
    "flow_map",
    "flow_sde",
    "flow_transport",
    "follow",
    "freedom",
    "from_denoiser",
    "from_edm",
    "from_eps",
    "from_hub",
    "from_latents",
    "from_logits",
    "from_pipeline",
    "from_score",
    "from_v",
    "from_velocity",
    "geometric_tempering",
    "grpo",
    "guidance",
    "guide",
    "guided",
    "half_transport",
    "importance_sampling",
    "karras_sigmas",
    "killing",
    "lgd",
    "load",
    "load_run",
    "load_trajectory",
    "log_snr_times",
    "mala",
    "maximum",
    "methods",
    "minority",
    "minority_guidance",
    "minority_metrics",
    "minority_prompt",
    "minority_score",
    "missing_objects",
    "models",
    "mpgd",
    "multinomial",
    "native",
    "ode",
    "ode_steps",
    "optimal_times",
    "own_solver",
    "particle_gibbs",
    "path_moves",
    "pcn",
    "pcnl",
    "potentials",
    "preflight",
    "preview",
    "prior",
    "prior_guidance",
    "progress",
    "proposals",
    "psi",
    "quantile_labels",
    "recur",
    "resample",
    "resamplers",
    "residual",
    "restart",
    "resumable",
    "rollout",
    "rules",
    "sample",
    "save_trajectory",
    "schedules",
    "score_transport",
    "second_order",
    "self_guided",
    "sigma_times",
    "smc",
    "snr_share",
    "ssp",
    "stratified",
    "switched",
    "systematic",
    "tds",
    "tfg",
    "top_k_of_n",
    "total",
    "trackers",
    "transports",
    "twisted",
    "ugd",
    "ula",
    "uniform_times",
    "unmask",
    "vcg",
    "verify",
    "waste_free",
    "x0_hat",
]
