"""`steer.Generator`: a model, rewards and a method, opened once, for one prompt after another."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..core.temperature import Temperature
from ..errors import SteerError
from ..evaluation.methods import name_of, sample
from ..execution.journal import CHECKPOINT
from ..key import Key
from ..report.pictures import Video, is_pictures, to_array, to_file, to_pictures
from ..report.run_report import shown
from ..results.result import Result
from ..types import ReverseProcess
from .claims import Claim
from .opening import Opener, accepted, opener
from .place import Place
from .prompts import Row, rows_of
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from PIL.Image import Image

LOOK_AGAIN = 0.5  # seconds, at rows that others make
RETRIED = (OSError, torch.OutOfMemoryError)  # what may go well the next time; other errors would come again


class Made(NamedTuple):
    """One row of a stream: its Row, and its Result or the error that ended it."""

    row: Row
    result: Result | None
    error: Exception | None


class Generator:
    """Samples by a method, prompt after prompt, on a model that is loaded once, when it is first needed.

        generator = steer.Generator("./my-pipeline", reward="clip:clip.safetensors", method="svdd", budget=2000)
        result = generator.one(0, "a red fox in snow", guidance_scale=5.0)

    Row i draws its noise by the key's problem i, and nothing else names it. So any subset of rows, in any order, on any
    number of processes, gives the same bits.

    Args:
        model: the name of an embedded model, a folder with a model_index.json, "owner/name" of the hub (see
            `steer.from_hub`), a pipeline, a process (of models without prompts), or a function of (prompt, **call) to a
            process.
        reward: a reward or its specification, "0.5*clip:FILE"; or several, which are summed.
        method: name of a method, or a method.
        budget: network rows a prompt, never exceeded; or
        particles: samples a prompt.
        temperature: divides the reward; "auto" is chosen for each row by itself, from unsteered samples.
        seed: of all noise.
        steps: of the chain; None for the model's own number.
        device: where the model goes; dtype: "fp32", "bf16" or "fp16" of its networks.
        call: arguments of the model's call for all rows.
        options: the method's own.
        keep: how many samples of each row become pictures: drawn by weight, the best first.
        retries: of a row, where memory or a connection failed.
        checkpoint: seconds between two snapshots in the journal of a row under way (`steer.resumable`); None: never.
        download: whether a model or reward that is not on this machine may be fetched.
    """

    def __init__(
        self,
        model: Any,
        *,
        reward: Any,
        method: str | Callable[..., Result] = "smc",
        budget: int | None = None,
        particles: int | None = None,
        temperature: Temperature = 1.0,
        seed: int = 0,
        steps: int | None = None,
        device: str | None = None,
        dtype: str = "fp32",
        call: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        keep: int = 1,
        retries: int = 2,
        checkpoint: float | None = CHECKPOINT,
        download: bool = False,
    ) -> None:
        if budget is not None and particles is not None:
            raise SteerError("give a budget or a number of particles, not both")
        self.model, self.reward, self.method = model, reward, method
        self.budget, self.particles, self.seed = budget, particles, seed
        self.temperature: Temperature = temperature
        self.steps, self.device, self.dtype, self.call = steps, device, dtype, dict(call or {})
        self.options, self.keep, self.retries, self.download = dict(options or {}), keep, retries, download
        self.checkpoint = checkpoint
        self._opener: Opener | None = None
        self._reward: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: each worker loads its own."""
        return {**vars(self), "_opener": None, "_reward": None}

    @property
    def accepted(self) -> list[str]:
        """Names of the arguments of the model's call, "prompt" among them where it takes one."""
        return accepted(self._open)

    def rows(self, entries: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Rows of prompts and call arguments, checked against the model: see `prompts.rows_of`."""
        return rows_of(entries, self.accepted)

    def process(self, prompt: str | None = None, **call: Any) -> ReverseProcess:
        """The model opened for a prompt."""
        given = {**self.call, **call}
        return self._open(**({} if prompt is None else {"prompt": prompt}), **given)

    def one(self, index: int, prompt: str | None = None, /, *, journal: Path | None = None, **call: Any) -> Result:
        """Samples of row `index`.

        Args:
            index: names the noise.
            prompt: what the model is asked for.
            journal: directory of a journal, so that a killed row goes on (`steer.resumable`).
            **call: arguments of the model's call for this row, over those for all.
        """
        process = self.process(prompt, **call)
        return sample(
            process,
            self.score(process),
            method=self.method,
            temperature=self.temperature,
            key=Key(self.seed).shifted(problem=index),
            journal=journal,
            checkpoint=self.checkpoint,
            **({"budget": self.budget} if self.particles is None else {"particles": self.particles}),
            **self.options,
        )

    def stream(self, rows: Iterable[Row]) -> Iterator[Made]:
        """One row after another; an error ends its row, and not the stream."""
        for row in rows:
            try:
                yield Made(row, self._tried(row, None), None)
            except Exception as error:
                if _poisoned(error):
                    raise
                yield Made(row, None, error)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Columns in, columns out: for `ray.data.Dataset.map_batches` and `datasets.Dataset.map(batched=True)`.

        Args:
            batch: equal columns; "index", which names the noise, and "prompt" where the model takes one; columns that
                the model's call takes are its arguments.

        Returns:
            One entry per sample kept: index, particle, prompt, image (uint8 [H, W, C], or [H, W]; of a video [F, H, W,
            C]), score, weight, nfe and error, which is "" where all went well; of a failed row there is one entry with
            the rest None.
        """
        if "index" not in batch:
            raise SteerError("the batch needs a column index: the place in a batch would name other noise every time")
        names = list(batch)
        entries = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for entry in entries:
            index = int(entry.pop("index"))
            (row,) = self.rows([entry])
            for made in self.stream([replace(row, index=index)]):
                for record in self._records(made):
                    for name in _COLUMNS:
                        found[name].append(record[name])
        return found

    def run(
        self, directory: RunDirectory, indices: Sequence[int], place: Place | None = None, *, claim: bool = True
    ) -> Iterator[tuple[int, Exception | None]]:
        """Makes rows of a run directory, those of this place first, then whatever nobody else makes.

        A row that another process holds is waited for, and taken over if that process dies. So a process ends when all
        rows are made or have failed, whoever did it, and a launcher that ends all of its processes when the first one
        fails cuts no row short. A row that has failed elsewhere meanwhile is not tried again.

        Args:
            directory: the run.
            indices: rows to make.
            place: of this process among those that share the directory.
            claim: whether rows are claimed, so that processes share them out; without, only this place's are made.

        Yields:
            The index of each row made here, and the error of a failed one.
        """
        rank, world, _ = place or Place()
        own = [index for index in indices if index % world == rank]
        if not claim:
            for index in own:
                if directory.state(index) != "finished":
                    yield index, self.make(directory, directory.rows[index])
            return
        attempts = {index: directory.attempts(index) for index in indices}
        left = own + [index for index in indices if index % world != rank]
        while left:
            held = []
            for index in left:
                if _over(directory, index, attempts[index]):
                    continue
                mine = Claim(directory.claim(index))
                if not mine.take():
                    held.append(index)
                    continue
                with mine.held():
                    if not _over(directory, index, attempts[index]):  # by another, before we claimed it
                        yield index, self.make(directory, directory.rows[index])
            left = held
            if left:
                time.sleep(LOOK_AGAIN)

    def make(self, directory: RunDirectory, row: Row) -> Exception | None:
        """Makes a row of a run directory; its error, of which there is a record, where it failed."""
        try:
            result = self._tried(row, directory.folder(row.index) / "journal")
            directory.save(row, result, self._pictures(directory, row, result))
        except Exception as error:
            directory.failed(row.index, error)
            if _poisoned(error):
                raise
            return error
        return None

    def _tried(self, row: Row, journal: Path | None) -> Result:
        for attempt in range(self.retries + 1):
            try:
                return self.one(row.index, row.prompt, journal=journal, **row.call)
            except Exception as error:
                if attempt == self.retries or not isinstance(error.__cause__ or error, RETRIED):
                    raise
        raise AssertionError("unreachable")

    def _kept(self, result: Result) -> Iterator[tuple[dict[str, Any], Image | Video | None]]:
        """The samples of a row that are kept, the best first: their numbers, and their pictures where they are some."""
        index = shown(result, min(self.keep, result.reward.shape[1]))
        chosen = result.take(index)
        pictures = to_pictures(chosen.decoded) if is_pictures(chosen.decoded) else [None] * index.shape[1]
        parts = self._parts(chosen)
        for number, particle in enumerate(index[0].tolist()):
            numbers = {"particle": particle, "score": chosen.reward[0, number].item()}
            numbers |= {"weight": result.log_weight[0, particle].exp().item(), "nfe": result.cost.nfe}
            numbers |= {f"reward.{name}": scores[number].item() for name, scores in parts.items()}
            if result.process.text is not None:
                numbers["text"] = chosen.texts[number]
            yield numbers, pictures[number]

    def _pictures(self, directory: RunDirectory, row: Row, result: Result) -> list[dict[str, Any]]:
        """Writes a row's pictures, and returns their entries for the metadata."""
        run = {"method": name_of(self.method), "budget": self.budget, "seed": self.seed}
        entries = []
        for number, (numbers, picture) in enumerate(self._kept(result)):
            name = None if picture is None else directory.save_picture(row.index, number, *to_file(picture))
            file = {} if name is None else {"file_name": name}
            entries.append({**file, "prompt": row.prompt, "index": row.index, **numbers, **run, **row.notes})
        return entries

    def _records(self, made: Made) -> Iterator[dict[str, Any]]:
        """What `__call__` returns of a row, sample by sample."""
        blank = {**dict.fromkeys(_COLUMNS), "index": made.row.index, "prompt": made.row.prompt, "error": ""}
        if made.result is None:
            yield {**blank, "error": f"{type(made.error).__name__}: {made.error}"}
            return
        for numbers, picture in self._kept(made.result):
            yield {**blank, **numbers, "image": None if picture is None else to_array(picture)}

    def _parts(self, chosen: Result) -> dict[str, torch.Tensor]:
        """Each reward's own score of the samples kept, where several are summed."""
        reward = self.score(chosen.process)
        if not hasattr(reward, "parts"):
            return {}
        prompts = None if chosen.process.prompts is None else list(chosen.process.prompts) * len(chosen.decoded)
        takes = "prompts" in inspect.signature(reward).parameters
        return reward.parts(chosen.decoded, **({"prompts": prompts} if takes and prompts else {}))

    @property
    def _open(self) -> Opener:
        if self._opener is None:
            self._opener = opener(
                self.model, steps=self.steps, device=self.device, dtype=self.dtype, download=self.download
            )
        return self._opener

    def score(self, process: ReverseProcess) -> Any:
        """The reward, on samples of this process."""
        if self._reward is None:
            from .. import rewards

            given = self.reward if isinstance(self.reward, list | tuple) else [self.reward]
            self._reward = rewards.from_specs(given, process.text)
        return self._reward


_COLUMNS = ("index", "particle", "prompt", "image", "score", "weight", "nfe", "error")


def _over(directory: RunDirectory, index: int, attempts: int) -> bool:
    """Whether a row has been finished, or tried more often than `attempts`."""
    return directory.state(index) == "finished" or directory.attempts(index) > attempts


def _poisoned(error: Exception) -> bool:
    """Whether later rows would fail too: a CUDA error that is no lack of memory leaves the device unusable."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)
