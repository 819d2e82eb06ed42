"""The same prompts by a loop, by torchrun and by Ray: is it the same dataset, and what does each add per prompt?

    python examples/benchmarks/workers.py [--rows 200] [--repeats 2] [--json workers.json]

A tiny Stable Diffusion 1.5 folder with random weights makes --rows prompts by
  - the plain loop, `steer.Generator(...).stream(rows)` in one process, which writes the pictures and nothing else;
  - `steer generate --prompts`: run directory, journals, claims, saved results; in one process, and under torchrun with
    1, 2 and 3;
  - `steer generate --workers 2`, by Ray, one of whose workers gets a SIGKILL when half of the rows are there.
The loop comes once more at the end: how far its two lines lie apart is what this machine cannot tell. All of it is done
--repeats times in turn, and the least counts, for others may use the machine.

Pictures are compared byte for byte with the loop's, tensors and ledgers bit for bit. Seconds of CPU are summed over all
processes that a line starts, threads and servers of Ray among them, and read four times a second; a line runs twice,
over few rows and over all: the slope is per prompt, and what is left is the start. Where others use the machine that is
rough, so what a run directory adds is measured once more in one process, row by row in turn with the loop. Exits with 1
where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import steer
from steer.generation.prompts import Row, read_prompts
from steer.generation.run_directory import RunDirectory
from steer.report.images import to_images, to_png
from steer.report.run_report import shown

TESTS = Path(__file__).parents[2] / "tests"
FEW = 6  # rows, of the run that shows what a start takes
STEPS, PARTICLES, CANDIDATES = 4, 2, 2
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]
RAY = ["-m", "steer", "generate", "--workers", "2"]


@dataclass
class Spent:
    """What a command took: seconds on the clock, and of CPU over all of its processes."""

    wall: float
    cpu: float


def watched(words: Sequence[str], out: Path, *, kill_at: int | None = None) -> tuple[Spent, int | None]:
    """Runs a command to its end; what it took, and the pid of the worker of Ray that was killed at `kill_at` rows."""
    began, seen, killed = time.perf_counter(), {}, None
    with (out.parent / f"{out.name}.log").open("wb") as log:
        top = psutil.Popen([sys.executable, *words], stdout=log, stderr=log)
        while top.poll() is None:
            for process in [top, *top.children(recursive=True)]:
                try:
                    times, kind = process.cpu_times(), " ".join(process.cmdline()[:1])
                except psutil.Error:
                    continue  # it has just ended
                seen[process.pid] = times.user + times.system
                if kill_at is None or killed is not None or not kind.startswith("ray::_Worker"):
                    continue
                if len(list(out.glob("rows/*/*/result.json"))) >= kill_at:
                    os.kill(process.pid, signal.SIGKILL)
                    killed = process.pid
            time.sleep(0.25)
    if top.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {top.returncode}:\n{Path(log.name).read_text()[-2000:]}")
    return Spent(time.perf_counter() - began, sum(seen.values())), killed


def generator(model: str) -> steer.Generator:
    """What all lines make rows by."""
    options = {"candidates": CANDIDATES}
    return steer.Generator(model, reward="jpeg", method="svdd", steps=STEPS, particles=PARTICLES, options=options)


def by_loop(maker: steer.Generator, rows: Sequence[Row], out: Path) -> dict[int, list[Any]]:
    """Rows as one would make them without a run directory: pictures on disk, and the facts of each row."""
    found = {}
    for made in maker.stream(rows):
        if made.result is None:
            raise SystemExit(f"row {made.row.index}: {made.error}")
        (image,) = to_images(made.result.take(shown(made.result, 1)).decoded)
        (out / f"{made.row.index:06d}.png").write_bytes(to_png(image))
        found[made.row.index] = facts(made.result.x, made.result.reward, made.result.log_weight, made.result.cost)
    return found


def plain_loop(model: str, prompts: str, out: Path) -> None:
    """The loop, in a process of its own."""
    maker = generator(model)
    (out / "facts.json").write_text(json.dumps(by_loop(maker, maker.rows(read_prompts(Path(prompts))), out)))


def in_turn(work: Path, count: int) -> list[float]:
    """Seconds of CPU that a run directory adds, for each of some rows made both ways in one process."""
    torch.set_num_threads(1)
    maker = generator(str(work / "model"))
    rows = maker.rows(read_prompts(write_prompts(work / "turns.jsonl", count)))
    directory = RunDirectory.open(work / "turns", {}, rows)
    (work / "turns_loop").mkdir()
    added = []
    for row in rows:
        marks = [time.process_time()]
        for way in ("loop", "directory") if row.index % 2 else ("directory", "loop"):
            if way == "loop":
                by_loop(maker, [row], work / "turns_loop")
            else:
                list(maker.run(directory, [row.index]))
            marks.append(time.process_time())
        first, second = marks[1] - marks[0], marks[2] - marks[1]
        added.append(second - first if row.index % 2 else first - second)
    return added[2:]  # the first ones load the model


def facts(x: torch.Tensor, reward: torch.Tensor, log_weight: torch.Tensor, cost: Any) -> list[Any]:
    """A row in short: a hash of its tensors, and its ledger."""
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in (x, reward, log_weight))
    return [hashlib.sha256(content).hexdigest(), cost.nfe, cost.grads, cost.rewards, cost.decodes]


def of_loop(out: Path) -> dict[int, tuple[bytes, list[Any]]]:
    """Picture and facts of each row of the plain loop."""
    found = json.loads((out / "facts.json").read_text())
    return {int(index): ((out / f"{int(index):06d}.png").read_bytes(), said) for index, said in found.items()}


def of_directory(out: Path) -> dict[int, tuple[bytes, list[Any]]]:
    """Picture and facts of each row of a run directory; a row that metadata.jsonl has twice, or not, is an error."""
    found = {}
    for line in (out / "metadata.jsonl").read_text().splitlines():
        entry = json.loads(line)
        index = entry["index"]
        if index in found:
            raise SystemExit(f"{out.name}: row {index} is in metadata.jsonl twice")
        saved = steer.load_run(out / "rows" / f"{index // 1000:03d}" / f"{index:06d}")
        tensors = saved.tensors
        said = facts(tensors["x"], tensors["reward"], tensors["log_weight"], saved.cost)
        found[index] = ((out / entry["file_name"]).read_bytes(), said)
    return found


def lines_of(model: Path) -> dict[str, tuple[int, list[str]]]:
    """By name, how many processes make rows, and the command, without its prompts and directory."""
    words = ["--model", str(model), "--reward", "jpeg", "--method", "svdd", "--steps", str(STEPS), "--quiet"]
    words += ["--particles", str(PARTICLES), "--set", f"candidates={CANDIDATES}"]
    lines = {"plain loop": (1, [__file__, "--loop", str(model)])}
    lines["steer generate"] = (1, ["-m", "steer", "generate", *words])
    for count in (1, 2, 3):
        lines[f"torchrun, {count}"] = (count, [*TORCHRUN, str(count), "-m", "steer", "generate", *words])
    lines["Ray, 2, one killed"] = (2, [*RAY, *words])
    lines["plain loop again"] = lines["plain loop"]
    return lines


def write_prompts(path: Path, count: int) -> Path:
    """A file of prompts."""
    lines = [json.dumps({"prompt": f"picture number {i} of a fox", "guidance_scale": 2.0}) for i in range(count)]
    path.write_text("\n".join(lines))
    return path


def compared(work: Path, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Every line, run and compared with the first."""
    sys.path.insert(0, str(TESTS))
    import tiny_pipelines

    torch.manual_seed(0)
    tiny_pipelines.sd15().save_pretrained(work / "model")
    files = {count: write_prompts(work / f"{count}.jsonl", count) for count in (FEW, rows)}
    lines, expected = lines_of(work / "model"), {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in lines}
    for repeat in range(repeats):
        for name, (_, words) in lines.items():
            out = work / f"{name.replace(' ', '_')}.{repeat}"
            one = measured(name, words, files, out)
            expected = expected or one["made"]
            made = one.pop("made")
            one["pictures"] = sum(made.get(index, (b"",))[0] == picture for index, (picture, _) in expected.items())
            tensors = {index: said[0] for index, (_, said) in made.items()}
            one["tensors"] = sum(tensors.get(index) == said[0] for index, (_, said) in expected.items())
            one["ledger"] = [sum(said[i] for _, said in made.values()) for i in range(1, 5)]
            one["same"] = made == expected and len(made) == rows
            found[name].append(one)
            print(f"{repeat} {name}: {one}", file=sys.stderr, flush=True)
    return [summary(name, lines[name][0], each, rows) for name, each in found.items()]


def measured(name: str, words: Sequence[str], files: dict[int, Path], out: Path) -> dict[str, Any]:
    """A line once: over few rows and over all, what it took, and what it made."""
    loop, found, killed = name.startswith("plain"), {}, None
    for count, prompts in files.items():
        folder = out.with_name(f"{out.name}.{count}")
        if loop:
            folder.mkdir()
        half = count // 2 if "killed" in name and count > FEW else None
        spent, killed = watched([*words, "--prompts", str(prompts), "--out", str(folder)], folder, kill_at=half)
        size = "few" if count == FEW else "all"
        found |= {f"cpu_{size}": spent.cpu, f"wall_{size}": spent.wall}
    return found | {"killed": killed, "made": of_loop(folder) if loop else of_directory(folder)}


def summary(name: str, processes: int, each: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """The repeats of a line: the least that it took, per prompt and to start, and whether all were the same."""
    line: dict[str, Any] = {"name": name, "processes": processes, "same": all(one["same"] for one in each)}
    for what in ("cpu", "wall"):
        few, whole = (min(one[f"{what}_{size}"] for one in each) for size in ("few", "all"))
        line[what] = (whole - few) / (rows - FEW)
        line[f"start_{what}"] = few - FEW * line[what]
    least = {what: min(one[what] for one in each) for what in ("pictures", "tensors")}
    return line | least | {"ledger": each[0]["ledger"], "killed": [one["killed"] for one in each], "repeats": each}


HEAD = """\
| | CPU ms a prompt | beside the loop | wall ms a prompt | CPU s to start | wall s to start | pictures | tensors | NFE |
|---|---|---|---|---|---|---|---|---|"""


def row_of(line: dict[str, Any], first: dict[str, Any], rows: int) -> str:
    """A line of the table."""
    cells = [line["name"], f"{1e3 * line['cpu']:.0f}", f"{1e3 * (line['cpu'] - first['cpu']):+.0f}"]
    cells += [f"{1e3 * line['wall']:.0f}", f"{line['start_cpu']:.1f}", f"{line['start_wall']:.1f}"]
    cells += [f"{line['pictures']} of {rows}", f"{line['tensors']} of {rows}", f"{line['ledger'][0]:,}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table; exits with 1 where a line did not make what the loop made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        plain_loop(args.loop, args.prompts, args.out)
        return
    if args.rows <= FEW:
        parser.error(f"--rows is more than {FEW}, which are run for the start")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: whoever shares the machine would go first
    with tempfile.TemporaryDirectory() as work:
        table = compared(Path(work), args.rows, args.repeats)
        added = in_turn(Path(work), args.rows)
    print(HEAD)
    for line in table:
        print(row_of(line, table[0], args.rows))
    low, middle, high = (1e3 * value for value in statistics.quantiles(added))
    print(f"a run directory adds {middle:+.1f} ms of CPU a prompt (quartiles {low:+.1f} and {high:+.1f}), in turn")
    killed = [pid for line in table for pid in line["killed"] if "killed" in line["name"]]
    print(f"{len(killed)} workers of Ray killed when {args.rows // 2} rows were there")
    good = all(line["same"] for line in table) and None not in killed
    print("every line has every row once, and the same pictures, tensors and ledgers" if good else "NOT all the same")
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "lines": table, "in_turn": added}, indent=1) + "\n")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
