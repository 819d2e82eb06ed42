"""The training loop that all networks of `emoji` share: it ends at a time, keeps checkpoints, and can go on."""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import torch
from data import WORK
from muon import Muon
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHECKPOINT_SECONDS = 240
LOG_SECONDS = 60
EDGES = ("embedding", "conv_in", "conv_out")  # first and last layers, which AdamW trains
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


def arguments(doc: str, minutes: float, rate: float) -> argparse.ArgumentParser:
    """The options of every training script."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder for everything that is made on the way")
    parser.add_argument("--minutes", type=float, default=minutes, help="how long to train")
    parser.add_argument("--until", help="train until this time of day instead, as 16:30")
    parser.add_argument(
        "--decay", type=float, default=0.25, help="last share of the time, over which the rate falls to 0"
    )
    parser.add_argument("--rate", type=float, default=rate, help="learning rate")
    parser.add_argument("--designs", choices=("core", "all"), default="core", help="those of core.txt, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    return parser


def end_of(args: argparse.Namespace) -> float:
    """When to stop, in seconds since 1970."""
    if args.until is None:
        return time.time() + 60 * args.minutes
    end = datetime.strptime(args.until, "%H:%M").time()
    moment = datetime.combine(datetime.now(), end)
    return (moment if moment > datetime.now() else moment + timedelta(days=1)).timestamp()


class Training:
    """Muon for matrices and AdamW for the rest, at a rate that warms up, stays and falls to zero; averaged weights.

    net: what is trained; its averaged weights are in the checkpoint, for `load_weights`.
    name: of the checkpoint in the work folder, `name.safetensors` and `name.json`.
    """

    def __init__(self, net: nn.Module, name: str, args: argparse.Namespace, ema: float = 0.999) -> None:
        self.net, self.ema = net, ema
        self.path = args.work / name
        self.args, self.step, self.seconds, self.loss, self.stopped = args, 0, 0.0, 0.0, False
        self.weights = {key: weight for key, weight in net.named_parameters() if weight.requires_grad}
        self.averages = {key: weight.detach().clone() for key, weight in self.weights.items()}
        matrices = [w for key, w in self.weights.items() if w.ndim > 1 and not any(name in key for name in EDGES)]
        others = [weight for weight in self.weights.values() if not any(weight is matrix for matrix in matrices)]
        self.optimizers = [
            Muon(matrices, args.rate),
            torch.optim.AdamW(others, args.rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        if args.resume:
            self.restore()

    def run(self, loss: Callable[[int], Tensor]) -> None:
        """Take steps until the time is up or the process is told to end; `loss` gets the step's number."""
        start, end = time.time(), end_of(self.args)
        decay, saved, logged, cpu = self.args.decay * (end - start), start, start, time.process_time() - self.seconds
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
        while (now := time.time()) < end and not self.stopped:
            rate = self.args.rate * min(1.0, (self.step + 1) / 100, (end - now) / max(decay, 1e-9))
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = rate
            torch.manual_seed(self.args.seed * 1_000_003 + self.step)
            value = loss(self.step)
            self.net.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            keep = min(self.ema, (1 + self.step) / (10 + self.step))
            current = [weight.detach() for weight in self.weights.values()]
            torch._foreach_lerp_(list(self.averages.values()), current, 1 - keep)
            self.loss += (value.item() - self.loss) * max(0.01, 1 / self.step)
            self.seconds = time.process_time() - cpu
            if now - logged > LOG_SECONDS:
                logged = now
                self.log()
            if now - saved > CHECKPOINT_SECONDS:
                saved = now
                self.save()
        self.save()
        self.log()

    def log(self) -> None:
        """Where it stands."""
        print(f"{self.step} steps, {self.seconds:.0f} s of a core, loss {self.loss:.4f}", flush=True)

    def save(self) -> None:
        """Replace the checkpoint in one move each."""
        tensors = {f"weight.{key}": weight.detach().contiguous() for key, weight in self.weights.items()}
        tensors |= {f"average.{key}": weight.contiguous() for key, weight in self.averages.items()}
        for key, weight in self.weights.items():
            for optimizer in self.optimizers:
                state = optimizer.state.get(weight, {})
                tensors |= {f"{name}.{key}": state[name].contiguous() for name in MOMENTS if name in state}
        save_file(tensors, f"{self.path}.new")
        os.replace(f"{self.path}.new", f"{self.path}.safetensors")
        progress = {"step": self.step, "seconds": self.seconds, "loss": self.loss}
        Path(f"{self.path}.new").write_text(json.dumps(progress))
        os.replace(f"{self.path}.new", f"{self.path}.json")

    def restore(self) -> None:
        """Go on from the checkpoint."""
        tensors, progress = load_file(f"{self.path}.safetensors"), json.loads(Path(f"{self.path}.json").read_text())
        self.step, self.seconds, self.loss = progress["step"], progress["seconds"], progress["loss"]
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{key}"])
                self.averages[key].copy_(tensors[f"average.{key}"])
                state = {name: tensors[f"{name}.{key}"] for name in MOMENTS if f"{name}.{key}" in tensors}
                optimizer = self.optimizers["momentum" not in state]
                optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **state}


def load_weights(net: nn.Module, tensors: dict[str, Tensor], which: str = "average") -> None:
    """The weights of a checkpoint into the network they were trained in: the "average", or the last "weight"s.

    After a few thousand steps that end with a rate of zero the last ones are the better: the average lags behind.
    """
    with torch.no_grad():
        for key, weight in net.named_parameters():
            if f"{which}.{key}" in tensors:
                weight.copy_(tensors[f"{which}.{key}"])
