"""How far training-free guidance is from the posterior, and that weights bring it there.

    python examples/benchmarks/guidance_linear_gaussian.py [--out guidance.json]

Data N(0, I) in the plane, y = x_1 + N(0, .3^2), y = 1.5, ancestral sampling in 50 steps. The posterior of the discrete
chain is known (mean 1.357, std .285 of x_1; 1.376, .287 in the limit). Each setting alone, 4000 samples: bias of mean
and std, standard errors .005 and .003. The same as the proposal of SMC, 512 problems of 32 particles weighted once, at
the end: the largest |z| of evidence, means and variances, the posterior mean pooled by evidence, the spread of log Z,
which is what a proposal is good for. Below 4 where the weights' variance can be seen in a sample; a proposal that is
narrower than the posterior, of negative bias of std, has weights of enormous variance, and no sample shows its mean.
Cost: backward rows and potentials per network row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

import steer
from steer import guidance as g
from steer.models import chain_law

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from exact import worst, z_scores


class Observation:
    """log N(y; x_1, .3^2) up to its constant."""

    y, noise = 1.5, 0.3

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return -0.5 * ((x.double()[:, 0] - self.y) / self.noise).square()

    def quadratic_form(self, size: int) -> steer.QuadraticForm:
        pick = torch.zeros(size, dtype=torch.float64)
        pick[0] = 1.0 / self.noise**2
        return steer.QuadraticForm(torch.diag(pick), self.y * pick, -0.5 * self.y**2 / self.noise**2)


F = Observation()
RAW = {"halvings": 0}
SETTINGS = {
    "none": g.Hooks(),
    "DPS, .2": g.dps(F, 0.2),
    "DPS, .27 = sqrt(2 KL / steps)": g.dps(F, 0.27),
    "DPS, .5": g.dps(F, 0.5),
    "DPS, native .02, no backtracking": g.dps(F, g.native(0.02), **RAW),
    "DPS, native .005, decrease, no backtracking": g.dps(F, g.native(0.005), rho_profile=g.decreasing, **RAW),
    "LGD, .2": g.lgd(F, 0.2),
    "FreeDoM, .2": g.freedom(F, 0.2),
    "FreeDoM, .2, 4 recurrences": g.freedom(F, 0.2),
    "MPGD, .2": g.mpgd(F, 0.2),
    "UGD, .1 and .025 x 4": g.ugd(F, 0.1, 0.025),
    "TFG, .1 and .025 x 4": g.tfg(F, rho=0.1, mu=0.025),
    "TFG, native .25 and .25, no backtracking": g.tfg(
        F, rho=g.native(0.25), mu=g.native(0.25), sigma=0.01, iterations=1, **RAW
    ),
    "TFG, native .25 and .25": g.tfg(F, rho=g.native(0.25), mu=g.native(0.25), sigma=0.01, iterations=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=50, dtype=torch.float64)
    target = chain_law(process).exact(F)
    mean, std = float(target.mean[0]), math.sqrt(float(target.cov[0, 0]))
    print(f"exact: mean {mean:.4f}, std {std:.4f}, log Z {target.log_evidence:.4f}")
    print(f"{'setting':44s} {'displaced':>9s} {'bias mean':>10s} {'bias std':>9s} {'grads':>6s} {'potentials':>10s}"
          f" | {'|z|':>5s} {'mean':>6s} {'sd log Z':>8s}")  # fmt: skip
    rows = []
    for name, hooks in SETTINGS.items():
        chain = g.recur(process, 4) if "recurrences" in name else process
        target = chain_law(chain).exact(F)
        mean, std = float(target.mean[0]), math.sqrt(float(target.cov[0, 0]))
        guided = g.guide(chain, hooks)
        run = steer.rollout(guided, F, particles=4000, keep_states=False)
        x = run.x[0, :, 0]
        log = run.process.log.table()
        row = {
            "setting": name, "displaced": sum(m for m, _ in log.values()) / max(1, len(log)),
            "bias_mean": float(x.mean()) - mean, "bias_std": float(x.std()) - std,
            "grads": run.cost.grads / run.cost.nfe, "potentials": (run.cost.rewards - 4000) / run.cost.nfe,
        }  # fmt: skip
        line = (f"{name:44s} {row['displaced']:9.3g} {row['bias_mean']:10.3g} {row['bias_std']:9.3g}"
                f" {row['grads']:6.2f} {row['potentials']:10.2f} | ")  # fmt: skip
        options = {"weight": steer.final_only(), "selection": steer.resample(threshold=0.0)}
        found = steer.smc(chain, F, batch=512, particles=32, key=1, proposal=g.follow(hooks), **options)
        share = (found.log_evidence - target.log_evidence).exp()
        row["z"] = worst(z_scores(found, target))[0]
        row["smc_mean"] = float((share * found.mean(lambda x: x)[:, 0]).sum() / share.sum())
        row["sd_log_z"] = float(found.log_evidence.std())
        print(f"{line}{row['z']:5.1f} {row['smc_mean']:6.3f} {row['sd_log_z']:8.2f}")
        rows.append(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
