"""SIGKILL at random moments, then the same command again: is the result the one of a run that nobody disturbed?

    python examples/benchmarks/kill_and_resume.py prompts --rows 200 --kills 20     # a dataset, by the command line
    python examples/benchmarks/kill_and_resume.py methods --kills 100               # every method, in Python
    python examples/benchmarks/kill_and_resume.py methods --kills 100 --checkpoint 0    # and by a snapshot every step
    python examples/benchmarks/kill_and_resume.py flips --flips 200                 # single bits of what is on disk

`prompts` makes a tiny Stable Diffusion 1.5 folder with random weights, and compares pictures, metadata and tensors byte
for byte. `methods` runs every method of `steer.methods()` under a journal, on the embedded digits, and compares bits
and ledgers; `--checkpoint` is of `steer.resumable`. `flips` flips bits of journals, snapshots, saved runs and saved
states, one at a time, and opens them. All print counts, and exit with 1 where anything differs or a flipped bit is not
seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import steer
from steer import rewards

TESTS = Path(__file__).parents[2] / "tests"
COMMAND = [sys.executable, "-m", "steer"]


def killed_until_done(start: Callable[[], subprocess.Popen[bytes]], kills: int, span: float, rng: random.Random) -> int:
    """Starts a process again and again until it ends by itself; the number of times it was killed."""
    done = 0
    while True:
        process = start()
        if done < kills:
            try:
                process.wait(rng.uniform(0.1, 1.0) * span)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                continue
        if process.wait() != 0:
            raise SystemExit(f"a start ended with {process.returncode}")
        return done


def digests(folder: Path) -> dict[str, str]:
    """Pictures, metadata and tensors of a run of many prompts."""
    found = {}
    for path in sorted([*folder.glob("images/**/*.png"), folder / "metadata.jsonl"]):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("rows/*/*")):
        tensors = steer.load_run(path).tensors
        content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in ("x", "reward", "log_weight"))
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
        found[f"{path.name} nfe"] = str(steer.load_run(path).cost.nfe)
    return found


def prompts(args: argparse.Namespace, work: Path) -> bool:
    """A dataset by the command line, killed on the way; True where it is the one of an undisturbed run."""
    sys.path.insert(0, str(TESTS))
    import tiny_pipelines

    torch.manual_seed(0)
    tiny_pipelines.sd15().save_pretrained(work / "model")
    lines = [json.dumps({"prompt": f"picture number {i} of a fox", "guidance_scale": 2.0}) for i in range(args.rows)]
    (work / "prompts.jsonl").write_text("\n".join(lines))
    words = ["--model", str(work / "model"), "--prompts", str(work / "prompts.jsonl"), "--reward", "jpeg"]
    words += ["--method", "svdd", "--steps", "4", "--particles", "2", "--set", "candidates=2", "--quiet"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*COMMAND, "generate", *words, "--out", str(out), *more], **quiet)

    began = time.perf_counter()
    if start(work / "plain").wait():
        raise SystemExit("the undisturbed run failed")
    whole = time.perf_counter() - began
    span = 2.0 * whole / (args.kills + 1) + 5.0
    kills = killed_until_done(lambda: start(work / "killed"), args.kills, span, random.Random(args.seed))
    one, other = digests(work / "plain"), digests(work / "killed")
    equal, more = sum(one[name] == other.get(name) for name in one), len(set(other) - set(one))
    print(
        f"{args.rows} rows in {whole:.0f} s; {kills} SIGKILLs; {equal} of {len(one)} files, tensors and ledgers equal; "
    )
    print(f"{more} that should not be there")
    return one == other


class Slow:
    """A reward that takes its time, so that a kill can meet a run anywhere."""

    spec = rewards.DigitLogProb(3).spec

    def __init__(self) -> None:
        self.reward = rewards.DigitLogProb(3)

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return self.reward(samples)


def one_method(name: str, out: str, journal: str | None, checkpoint: float | None) -> None:
    """A run of a method, and its numbers as a file. In a process of its own."""
    torch.set_num_threads(1)
    process = steer.load("digits", steps=10)
    if journal is None:
        result = steer.sample(process, Slow(), method=name, budget=400, key=3)
    else:
        with steer.resumable(journal, every=0.05, checkpoint=checkpoint):
            result = steer.sample(process, Slow(), method=name, budget=400, key=3)
    tensors = (result.x, result.reward, result.log_weight, result.log_evidence)
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    cost = result.cost
    facts = [hashlib.sha256(content).hexdigest(), cost.nfe, cost.grads, cost.rewards, cost.decodes]
    draft = Path(f"{out}.part")
    draft.write_text(json.dumps(facts))
    os.replace(draft, out)


def methods(args: argparse.Namespace, work: Path) -> bool:
    """Lives of every method under a journal, killed on the way; True where all end as undisturbed runs do.

    The methods take turns, so that a benchmark that is cut short has tried them all: first a life of each with one
    kill, then one of each with two, and so on.
    """
    rng, names, good, total = random.Random(args.seed), list(steer.methods()), True, 0
    one_method("rollout", str(work / "warm"), None, None)  # what is imported and loaded here need not be in each child
    spans = {}
    for name in names:
        began = time.perf_counter()
        _forked(name, work / f"{name}.plain", None, args.checkpoint).wait()
        spans[name] = time.perf_counter() - began
    for life in range(1, args.kills + 1):
        for name in names:
            kills = min(life, args.kills - total)
            if kills == 0:
                break
            of, here = (name, args.checkpoint), (work / f"{name}.{life}", work / f"{name}.plain")
            done, size, same = _life(*of, *here, kills, spans[name], rng)
            good, total = good and same, total + done
            print(
                f"{total:4d} {name:20s} {spans[name]:5.1f} s, killed {done} times, journal {size:,} bytes: "
                f"{'same' if same else 'DIFFERS'}",
                flush=True,
            )
    print(f"{total} SIGKILLs over {len(names)} methods: {'all the same' if good else 'NOT the same'}")
    return good


def _life(
    name: str, checkpoint: float | None, out: Path, plain: Path, kills: int, span: float, rng: random.Random
) -> tuple[int, int, bool]:
    """A run, killed and started again until it ends: kills, bytes of its journal, and whether it is as `plain`."""
    done, journal = 0, out.with_suffix(".journal")
    while not out.exists():
        child = _forked(name, out, journal, checkpoint)
        if done < kills:
            try:
                child.wait(rng.uniform(0.05, 0.9) * span / kills)
            except subprocess.TimeoutExpired:
                os.kill(child.pid, signal.SIGKILL)
                done += 1
        child.wait()
    size = sum(path.stat().st_size for path in journal.glob("*.safetensors"))
    shutil.rmtree(journal)
    return done, size, out.read_text() == plain.read_text()


def flips(args: argparse.Namespace, work: Path) -> bool:
    """Single bits flipped in journals and saved runs; True where none is taken for what was written."""
    process, reward = steer.load("digits", steps=6), rewards.DigitLogProb(3)
    journals = {"journal": None, "snapshots": 0.0}  # all calls; a snapshot at every step
    for name, checkpoint in journals.items():
        with steer.resumable(work / name, every=0.0, checkpoint=checkpoint):
            result = steer.smc(process, reward, particles=8, key=1)
    folders = {"run": result, "tree": steer.search.dts_star(process, reward, particles=8, key=1)}
    for name, run in folders.items():
        run.save(work / name)
    steer.save_trajectory(result.trajectory, work / "states.safetensors")
    opened: dict[Path, Callable[[], object]] = {
        path: lambda path=path: steer.load_run(path.parent) for name in folders for path in (work / name).iterdir()
    }
    for name in journals:
        segments = sorted((work / name).glob("*.safetensors"))
        opened |= {path: lambda name=name: _opened(work / name) for path in segments}
    opened[work / "states.safetensors"] = lambda: steer.load_trajectory(work / "states.safetensors", process)
    kinds: dict[str, list[int]] = {}
    rng = random.Random(args.seed)
    for _ in range(args.flips):
        kind = rng.choice((*journals, *folders, "states.safetensors"))
        path = rng.choice([path for path in opened if kind in path.relative_to(work).parts])
        first = rng.random() < 0.5  # half of them in what comes first: lengths, names, digests
        bit = rng.randrange(8 * min(path.stat().st_size, 2048 if first else path.stat().st_size))
        found = kinds.setdefault(kind, [0, 0])
        found[0], found[1] = found[0] + 1, found[1] + refused(path, bit, opened[path])
    for kind, (tried, seen) in sorted(kinds.items()):
        print(f"{kind:20s} {seen} of {tried} flipped bits seen")
    tried, seen = (sum(found[i] for found in kinds.values()) for i in range(2))
    print(f"{seen} of {tried} flipped bits seen, each by a named error of steer's")
    return seen == tried


def refused(path: Path, bit: int, opens: Callable[[], object]) -> bool:
    """Whether a file with one bit flipped is refused by a named error, and the file as it was is not."""
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    path.write_bytes(broken)
    try:
        opens()
    except steer.SteerError:
        seen = True
    else:
        seen = False
    path.write_bytes(whole)
    opens()
    return seen


def _opened(journal: Path) -> None:
    with steer.resumable(journal):
        pass


class _forked:
    """A run of a method in a forked process."""

    def __init__(self, name: str, out: Path, journal: Path | None, checkpoint: float | None) -> None:
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                one_method(name, str(out), None if journal is None else str(journal), checkpoint)
                code = 0
            finally:
                os._exit(code)

    def wait(self, timeout: float | None = None) -> None:
        """As Popen.wait."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("", timeout or 0.0)
            else:
                time.sleep(0.005)
        if self.code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run ended with {self.code}")


def main() -> None:
    """Runs one of them in a temporary directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prompts", "methods", "flips"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=float, help="seconds between two snapshots (methods); never by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        good = {"prompts": prompts, "methods": methods, "flips": flips}[args.what](args, Path(work))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
