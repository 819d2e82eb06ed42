"""How time and memory of a run directory grow with prompts, particles and budget.

    python examples/benchmarks/growth.py [--steps 20]

Every line is a process of its own on the embedded digits: rows of `smc`, or of `svdd` by a budget, with journals as
always. Peak memory is above that of the process with the model loaded and one row made; seconds are per row, without
loading.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, PARTICLES, BUDGETS = (4, 16, 64), (4, 16, 64), (200, 800, 3200)


def measure(prompts: int, steps: int, **options: int) -> dict[str, float]:
    """One run, in this process."""
    import steer
    from steer.generation.run_directory import RunDirectory

    method = "svdd" if "budget" in options else "smc"
    generator = steer.Generator("digits", reward="ink", method=method, steps=steps, device="cpu", **options)
    with tempfile.TemporaryDirectory() as folder:
        rows = generator.rows([{"label": i % 10} for i in range(prompts + 1)])
        run = RunDirectory.open(Path(folder) / "run", {"prompts": prompts}, rows)
        list(generator.run(run, [prompts]))  # loads the model
        before, start = _peak(), time.perf_counter()
        errors = [error for _, error in generator.run(run, range(prompts)) if error]
        seconds = time.perf_counter() - start
        if errors:
            raise errors[0]
        disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    return {"seconds": seconds / prompts, "MiB": _peak() - before, "disk": disk / 2**10 / (prompts + 1)}


def _peak() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(steps=args.steps, **json.loads(args.one))))
        return
    cases = [{"prompts": prompts, "particles": 16} for prompts in PROMPTS]
    cases += [{"prompts": 4, "particles": particles} for particles in PARTICLES]
    cases += [{"prompts": 4, "budget": budget} for budget in BUDGETS]
    print("| prompts | particles | budget | seconds a row | MiB above one row | KiB on disk a row |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        words = [sys.executable, __file__, "--steps", str(args.steps), "--one", json.dumps(case)]
        found = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
        cells = [case["prompts"], case.get("particles", ""), case.get("budget", "")]
        cells += [f"{found['seconds']:.2f}", f"{found['MiB']:.0f}", f"{found['disk']:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
