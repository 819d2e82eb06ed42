"""Time-integrated coefficients of one step of a Gaussian path, exact for Gaussian data of a given variance."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..errors import SteerError
from ..types import Level


class StepIntegrals(NamedTuple):
    """One step from a level to the next, in the scaled state y = ratio x' - x.

    The reverse SDE at left-point coefficients is y = Gamma s + sqrt(Gamma) noise. A score that decays along the step,
    s = -x / (alpha^2 c + sigma^2) for data N(0, c), makes that wrong by O(step); its integrals are known, and they are
    what stands here. As steps shrink every choice of c gives the same limit.

    ratio: alpha / alpha'.           gamma: variance that noising adds to ratio x', the integral of g^2.
    total: alpha^2 c + sigma^2.      fade:  share of it that is left at the next level, 1 - gamma / total.
    """

    ratio: float
    gamma: float
    total: float
    fade: float

    @property
    def log_ratio(self) -> float:
        """log(alpha / alpha'), the integral of f / x in sampling time with its sign changed."""
        return math.log(self.ratio)

    @property
    def rate(self) -> float:
        """Integral of g^2 h for an integrand h that grows as 1 / (alpha^2 c + sigma^2), per h at the start."""
        return -self.total * math.log(self.fade)

    def drift(self, pull: float) -> float:
        """Integral of g^2 for a drift g^2 u / 2 with u = pull times the score of the data N(0, c)."""
        return 2.0 * self.total * -math.expm1(0.5 * pull * math.log(self.fade)) / pull

    def noise(self, pull: float, v: float) -> float:
        """Variance at the end of the step of noise v g^2 that fades by that drift."""
        log_fade = math.log(self.fade)
        if abs(pull - 1.0) < 1e-9:
            return -v * self.total * self.fade * log_fade
        return v * self.total * (self.fade - math.exp(pull * log_fade)) / (pull - 1.0)


def span(here: Level, there: Level, sigma_data: float) -> StepIntegrals:
    """Coefficients of the step from `here` to `there` for data of standard deviation sigma_data per coordinate."""
    if not here.alpha > 0.0:
        raise SteerError(
            f"the path's own diffusion coefficient diverges at t = {here.t}, where alpha = 0; start the grid lower "
            "(steer.uniform_times does)"
        )
    ratio = here.alpha / there.alpha
    gamma = here.sigma**2 - (ratio * there.sigma) ** 2
    total = (here.alpha * sigma_data) ** 2 + here.sigma**2
    fade = ratio**2 * ((there.alpha * sigma_data) ** 2 + there.sigma**2) / total
    return StepIntegrals(ratio=ratio, gamma=gamma, total=total, fade=fade)
