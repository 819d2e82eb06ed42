"""One population over the processes of a `torch.distributed` group: everyone decides, each computes its share of rows.

Every rank runs the same lines on the same states, which are small. Only paid calls (`steer.calls`) are split: a rank
evaluates its own particles of every problem and gathers the answers. So methods know nothing of ranks, and the whole
Result is on every rank.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..calls import Answer, callers, fingerprint, through
from ..cost import Meter
from ..errors import DistributedError
from ..types import Stop

FINE, STOP, FAILED, LEFT = range(4)
SPLIT = ("denoise", "score", "value_and_grad")  # rows are independent of each other, and of their place


@contextmanager
def together(group: Any = None, *, check: bool = True) -> Iterator[Ranks]:
    """Splits the particles of every run in the block over the ranks of a process group.

        torch.distributed.init_process_group("nccl")       # torchrun --nproc-per-node 2 script.py
        with steer.distributed.together():
            result = steer.smc(process, reward, particles=256, key=0)

    Every rank runs the same lines with the same arguments, and each has the model on its own device.

    Args:
        group: a group of `torch.distributed`; None for all ranks.
        check: whether every call compares a hash of its states over the ranks, so that runs that have drifted apart
            (other devices' rounding, a user's own random numbers) end by an error, and not in a wrong answer.

    Yields:
        The Ranks: `rank`, `world`, and `seconds` spent on agreement.

    Raises:
        DistributedError: on every rank, where one fails, is killed, or has drifted apart. The rank that failed has its
            own error as the cause, and errors keep what was paid for in `.partial`. Ctrl-C and SIGTERM at any rank end
            the run on all at the same step, as Ctrl-C does in one process.

    Cost: rows of the whole population are in the ledger, the same on every rank. One exchange of a few numbers a call,
    and a gather of its answers. Methods that ask about one state at a time (rbf, depth_first) run, and gain nothing.
    """
    ranks = Ranks(group, check=check)
    with ranks.listening(), through(ranks):
        try:
            yield ranks
        except BaseException as error:
            ranks.leave(error)
            raise
        ranks.leave(None)


def current() -> Ranks | None:
    """The ranks that runs are split over at this point of the program; None outside of `together`."""
    return next((caller for caller in callers() if isinstance(caller, Ranks)), None)


class Ranks:
    """The processes of a group, as a caller of paid calls.

    rank, world: this process among how many.      seconds: spent on agreement so far.      calls: made so far.
    """

    def __init__(self, group: Any = None, *, check: bool = True) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise DistributedError(
                "together splits a population over a process group, and there is none; start the script by torchrun "
                "and call torch.distributed.init_process_group() first"
            )
        self.group: Any = group
        self.check = check
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        gloo = dist.get_backend(group) == "gloo"
        members = None if group is None else dist.get_process_group_ranks(group)
        self.numbers: Any = group if gloo else dist.new_group(members, backend="gloo")
        self.seconds, self.calls = 0.0, 0
        self.asked = self.stopping = self.ended = False

    def __call__(
        self, meter: Meter, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = ""
    ) -> Answer:
        """The whole answer, of which this rank computes its own particles."""
        if kind == "groupwise":
            return function(*tensors)
        if kind not in SPLIT:  # it draws by the place of a particle, or takes derivatives through its predictions
            with through(self):
                return function(*tensors)
        count = tensors[0].shape[1]
        index = self._columns(count, tensors[0].device)
        own = int((index < count).sum())
        before, answer, trouble = meter.counts, {}, None
        try:
            answer = function(*(_Scatter.apply(tensor, self, index.clamp(max=count - 1), own) for tensor in tensors))
        except (Exception, KeyboardInterrupt) as error:
            trouble = error
        spent = [(now - then) * own // len(index) for now, then in zip(meter.counts, before, strict=True)]
        spent = self._agree(f"{kind} at level {k}" if k >= 0 else kind, tensors[0], trouble, spent)
        meter.counts = [then + more for then, more in zip(before, spent, strict=True)]
        return {name: _Gather.apply(part, self, count) for name, part in answer.items()}

    def least(self, count: int) -> int:
        """The smallest of the ranks' numbers. Raises where one has failed or left, as calls do."""
        return int(self._table("an agreement", None, None, [count, 0, 0, 0], stops=False)[:, 0].min())

    def leave(self, error: BaseException | None) -> None:
        """Tells the others that this rank makes no more calls; they fail if they still do and it did by an error."""
        if not self.ended:
            self.ended = True
            try:
                self._agree("the end of the block", None, error, [0, 0, 0, 0], leaving=True)
            except DistributedError:
                if error is None:
                    raise

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are noted, and end the run on all ranks at their next call."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def _columns(self, count: int, device: Any) -> Tensor:
        """Particles of this rank; as many on every rank, so some are past the end."""
        size = -(-count // self.world)
        return torch.arange(self.rank * size, (self.rank + 1) * size, device=device)

    def _agree(
        self, what: str, x: Tensor | None, trouble: BaseException | None, spent: list[int], *, leaving: bool = False
    ) -> list[int]:
        """What all ranks have spent. Raises the same on all of them where one failed, left, stopped or drifted."""
        self.calls += 1
        return self._table(what, x, trouble, spent, leaving=leaving).sum(0).tolist()

    def _table(
        self,
        what: str,
        x: Tensor | None,
        trouble: BaseException | None,
        numbers: list[int],
        *,
        leaving: bool = False,
        stops: bool = True,
    ) -> Tensor:
        """Four numbers of each rank, [world, 4]. stops: whether Ctrl-C at one of them may end the run here."""
        stopped = stops and (self.asked or isinstance(trouble, KeyboardInterrupt | Stop))
        status = LEFT if leaving else STOP if stopped and not self.stopping else FAILED if trouble else FINE
        mark = int(fingerprint(x)[:12], 16) if self.check and x is not None else 0
        table = self._exchange([status, 0 if trouble is None else 1, mark, *numbers])
        left, failed = table[:, 0] == LEFT, (table[:, 0] == FAILED) | ((table[:, 0] == LEFT) & (table[:, 1] == 1))
        if bool(left.all()):
            return table[:, 3:]
        if bool(failed.any()):
            self._fail(int(failed.nonzero()[0]), what, trouble)
        if bool(left.any()):
            self.ended = True
            raise DistributedError(
                f"rank {int(left.nonzero()[0])} of {self.world} has left the block while others are still at {what}: "
                "all ranks must run the same lines with the same arguments"
            )
        if bool((table[:, 0] == STOP).any()):
            self.stopping = True
            raise Stop
        if bool((table[:, 2] != table[0, 2]).any()):
            self.ended = True
            raise DistributedError(
                f"the ranks have drifted apart at {what}: their states differ. They must run the same lines with the "
                "same arguments and key, on devices of one kind"
            )
        return table[:, 3:]

    def _fail(self, rank: int, what: str, trouble: BaseException | None) -> None:
        """Raises DistributedError with the message of the rank that failed."""
        import torch.distributed as dist

        self.ended = True
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, trouble and f"{type(trouble).__name__}: {trouble}", group=self.numbers)
        raise DistributedError(f"rank {rank} of {self.world} failed in {what}: {said[rank]}") from trouble

    def _exchange(self, numbers: list[int]) -> Tensor:
        """The integers of all ranks, [world, len(numbers)]."""
        import time

        import torch.distributed as dist

        began, own = time.perf_counter(), torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.world)]
        try:
            dist.all_gather(parts, own, group=self.numbers)
        except RuntimeError as error:  # a rank that was killed
            self.ended = True
            raise DistributedError(f"rank {self.rank} of {self.world} lost touch with the others: {error}") from error
        finally:
            self.seconds += time.perf_counter() - began
        return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """The particles of all ranks from those of each; backward, each rank's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, count: int) -> Tensor:
        import torch.distributed as dist

        ctx.ranks = ranks
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
        dist.all_gather(parts, own.contiguous(), group=ranks.group)
        return torch.cat(parts, 1)[:, :count].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        count = gradient.shape[1]
        index = ctx.ranks._columns(count, gradient.device)
        return _Scatter.apply(gradient, ctx.ranks, index.clamp(max=count - 1), int((index < count).sum())), None, None


class _Scatter(torch.autograd.Function):
    """This rank's particles; those past the end repeat the last, and have no gradient. Backward, all ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, index: Tensor, own: int) -> Tensor:
        ctx.ranks, ctx.count, ctx.own = ranks, x.shape[1], own
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        kept = torch.arange(gradient.shape[1], device=gradient.device) < ctx.own
        gradient = gradient * kept.view(1, -1, *(1,) * (gradient.ndim - 2)).to(gradient)
        return _Gather.apply(gradient, ctx.ranks, ctx.count), None, None, None
