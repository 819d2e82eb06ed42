"""steer: inference-time reward alignment of frozen diffusion and flow models."""

from . import models
from .cost import Cost
from .errors import (
    BudgetError,
    CollapsedWeightsError,
    ModelError,
    NonFiniteError,
    NotDifferentiableError,
    NotStochasticError,
    RewardError,
    ShapeError,
    StateSpaceError,
    SteerError,
)
from .key import Key
from .models.embedded import load
from .models.pipeline import from_pipeline
from .potentials import adaptive_tempering, difference, final_only, geometric_tempering, maximum, total
from .process import GaussianProcess, convert, from_denoiser, from_eps, from_score, from_v, from_velocity
from .resampling import killing, multinomial, residual, ssp, stratified, systematic
from .result import Result
from .rollout import importance_sampling, rollout
from .sample import compare, methods, sample
from .schedules import VE, VP, Cosine, RectifiedFlow, Tabulated, log_snr_times, sigma_times, uniform_times
from .smc import bootstrap, guided, prior, resample, smc
from .trajectory import Trajectory
from .transitions import Normal, churn, cps, ddim, euler_maruyama, flow_sde, ode
from .types import Coeffs, Denoiser, Level, QuadraticForm, ReverseProcess, Reward, Rule, Schedule, Stop, Transition

__version__ = "0.1.0"

__all__ = [
    "VE",
    "VP",
    "BudgetError",
    "Coeffs",
    "CollapsedWeightsError",
    "Cosine",
    "Cost",
    "Denoiser",
    "GaussianProcess",
    "Key",
    "Level",
    "ModelError",
    "NonFiniteError",
    "Normal",
    "NotDifferentiableError",
    "NotStochasticError",
    "QuadraticForm",
    "RectifiedFlow",
    "Result",
    "ReverseProcess",
    "Reward",
    "RewardError",
    "Rule",
    "Schedule",
    "ShapeError",
    "StateSpaceError",
    "SteerError",
    "Stop",
    "Tabulated",
    "Trajectory",
    "Transition",
    "adaptive_tempering",
    "bootstrap",
    "churn",
    "compare",
    "convert",
    "cps",
    "ddim",
    "difference",
    "euler_maruyama",
    "final_only",
    "flow_sde",
    "from_denoiser",
    "from_eps",
    "from_pipeline",
    "from_score",
    "from_v",
    "from_velocity",
    "geometric_tempering",
    "guided",
    "importance_sampling",
    "killing",
    "load",
    "log_snr_times",
    "maximum",
    "methods",
    "models",
    "multinomial",
    "ode",
    "prior",
    "resample",
    "residual",
    "rollout",
    "sample",
    "sigma_times",
    "smc",
    "ssp",
    "stratified",
    "systematic",
    "total",
    "uniform_times",
]
