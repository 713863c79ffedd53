"""A run from its first phase to its adapter: fetch, data, plan, load, measure, train, measure, save.

`train` yields everything that happens and does no printing; `session` owns the thread it runs in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qlora_tui.engine import budget, builtin, checkpoint, hub
from qlora_tui.engine.batches import steps_per_epoch
from qlora_tui.engine.data import Dataset, Tokenized, load_tokenizer, prepare
from qlora_tui.engine.errors import CheckpointError, DataError, ModelError, Stopped, WontFit
from qlora_tui.engine.events import Event, Finding, Phase, PhaseName, Planned, Prepared, Resumed, Saved, Wishes
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.load import Loaded, choose_dtype, load
from qlora_tui.engine.machine import Machine, resident_bytes
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import BUILTIN, RunConfig, rows_per_step
from qlora_tui.engine.text import one_line
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import Holdout, poll_for
from qlora_tui.engine.train.loop import EVALS, SAVES, Loop
from qlora_tui.engine.train.optim import build_optimizer, choose_optimizer
from qlora_tui.engine.train.schedule import cadence, total_steps, warmup_steps
from qlora_tui.engine.watch import Watch

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked run: what `preflight` found, where to write, whom to listen to.

    `say` journals what a callback deep inside a download or the tokenizer has to tell, where a generator cannot yield.
    """

    run: RunConfig
    folder: Path
    model_files: ModelFiles
    model_spec: ModelSpec
    dataset: Dataset
    eval_dataset: Dataset | None
    machine: Machine
    wishes: Wishes
    say: Callable[[Event], object]
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, if it did not end in an error."""

    outcome: Literal["done", "stopped", "aborted"]
    reason: str
    adapter: str = ""


def train(job: Job) -> Generator[Event, None, Result]:
    """Run `job`, one event at a time.

    Raises:
        WontFit: the card ran out of memory; what to change is named.
        EngineError: anything else that ends a run, in one sentence.
    """
    try:
        return (yield from _train(job))
    except Stopped:
        outcome: Literal["stopped", "aborted"] = "aborted" if job.wishes.urgent() == "abort" else "stopped"
        return Result(outcome, f"{outcome} before the first step: there is nothing to save")
    except torch.cuda.OutOfMemoryError as error:
        raise WontFit(
            "the GPU ran out of memory",
            hint="close other programs on it, or lower max_length or per_device_train_batch_size, or turn gradient_checkpointing on",
        ) from error.with_traceback(None)  # the frames would keep the tensors alive


def _train(job: Job) -> Generator[Event, None, Result]:
    _limit_memory(job)
    folder = yield from _fetch(job)
    tokenized = yield from _data(job, folder)
    total = total_steps(job.run, steps_per_epoch(len(tokenized.train), rows_per_step(job.run)))
    yield from _announce(job, tokenized, total)
    began = time.monotonic()
    yield Phase("load", "begin", note=job.run.model_name_or_path)
    loaded = load(job.run, folder, job.machine)
    yield Phase("load", "end", seconds=time.monotonic() - began, peak_bytes=_peak(loaded.device))
    loop = _loop(job, loaded, tokenized, total)
    if job.resume:
        yield from _resume(job, loop)
    yield from loop.holdout.measure_base(loaded, loop.fence)
    if loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ending = yield from loop.train()
    return (yield from _finish(job, loop, folder, ending))


def _limit_memory(job: Job) -> None:
    if job.machine.kind == "cuda" and job.run.memory_limit_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.run.memory_limit_gib * GIB / total), 0)


def _fetch(job: Job) -> Generator[Event, None, Path]:
    """Bring the weights here; a local folder needs nothing, a second run downloads nothing."""
    name = job.run.model_name_or_path
    if Path(name).is_dir():
        return job.model_files.folder
    began = time.monotonic()
    yield Phase("fetch", "begin", note=name)
    progress = _teller(job.say, "fetch", "bytes")
    if name.startswith(BUILTIN):
        converting = Phase("fetch", "progress", note="converting it to safetensors, once; about half a minute")
        folder = builtin.fetch(progress, lambda: job.wishes.urgent() is not None, lambda: job.say(converting))
    else:
        folder = hub.weights(name, job.run.revision, job.model_files.commit, progress, lambda: job.wishes.urgent() is not None)
    yield Phase("fetch", "end", seconds=time.monotonic() - began)
    return folder


def _data(job: Job, folder: Path) -> Generator[Event, None, Tokenized]:
    """Turn rows into tokens and hold some out, before anything large is loaded."""
    began = time.monotonic()
    yield Phase("data", "begin", done=0, total=len(job.dataset.rows), unit="rows")
    tokenized = prepare(
        job.run,
        job.dataset,
        load_tokenizer(folder),
        eval_dataset=job.eval_dataset,
        stopping=lambda: poll_for(job.wishes),
        progress=_teller(job.say, "data", "rows"),
    )
    yield Phase("data", "end", seconds=time.monotonic() - began)
    if not tokenized.train:
        raise DataError("no row is left to train on", hint="see the reasons above; a larger max_length or other data would help")
    _check_ids(job, tokenized)
    return tokenized


def _check_ids(job: Job, tokenized: Tokenized) -> None:
    """Refuse tokens that the embedding has no row for: on a GPU they end the process in an assertion nobody understands."""
    highest = max(max(row.input_ids) for row in (*tokenized.train, *tokenized.holdout))
    size = job.model_spec.vocab_size
    if highest >= size:
        raise ModelError(
            f"its tokenizer makes token {highest} of these rows and the model ends at {size - 1}: they do not belong together",
            where=one_line(job.run.model_name_or_path),
            hint="take the tokenizer files that came with the model",
        )


def _announce(job: Job, tokenized: Tokenized, total: int) -> Iterator[Event]:
    """Say what will be trained and what it will take."""
    facts = tokenized.facts
    yield Prepared(
        format=job.dataset.format,
        why=job.dataset.why,
        rows=len(job.dataset.rows) + len(job.dataset.refused),
        train_rows=len(tokenized.train),
        holdout_rows=len(tokenized.holdout),
        tokens=facts.tokens,
        supervised_tokens=facts.supervised_tokens,
        steps_per_epoch=steps_per_epoch(len(tokenized.train), rows_per_step(job.run)),
        total_steps=total,
        refused=facts.refused,
        dropped=facts.dropped,
        max_row_tokens=facts.max_row_tokens,
        notes=facts.notes,
    )
    device = torch.device("cuda" if job.machine.kind == "cuda" else "cpu")
    choices = {
        "dtype": str(choose_dtype(job.run, job.machine)).removeprefix("torch."),
        "optim": choose_optimizer(job.run, device),
        "eval_steps": cadence(job.run.eval_steps, total, EVALS),
        "save_steps": cadence(job.run.save_steps, total, SAVES),
        "warmup_steps": warmup_steps(job.run, total),
    }
    yield Planned(budget.estimate(job.model_spec, job.run, job.machine, longest=facts.max_row_tokens).to_json(), choices)


def _loop(job: Job, loaded: Loaded, tokenized: Tokenized, total: int) -> Loop:
    run = job.run
    fence = Fence(loaded)
    holdout = Holdout(job.folder, tokenized.holdout, run.per_device_train_batch_size, job.wishes)
    optimizer = build_optimizer(run, fence.trained, loaded.device)
    loaded.model.train()
    return Loop(
        run=run,
        loaded=loaded,
        optimizer=optimizer,
        rows=tokenized.train,
        holdout=holdout,
        watch=Watch(total, warmup_steps(run, total)),
        fence=fence,
        wishes=job.wishes,
        total=total,
    )


def _resume(job: Job, loop: Loop) -> Iterator[Event]:
    """Go on from the newest checkpoint that proves sound; without any, start again and say so."""
    path, damaged = checkpoint.newest(job.folder)
    for sentence in damaged:
        yield Finding("checkpoint", "warn", 0, f"{sentence}; an older checkpoint is used", ("check the disk",))
    if path is None:
        if damaged:
            raise CheckpointError("no checkpoint of this run is sound", where=str(job.folder))
        yield Resumed(0)
        return
    state = checkpoint.restore(path, loop.loaded.model, loop.optimizer)
    loop.step = loop.saved_step = int(state["step"])
    loop.watch.restore(state["watch"])
    yield Resumed(loop.step)


def _finish(job: Job, loop: Loop, folder: Path, ending: str) -> Generator[Event, None, Result]:
    """Write the adapter and measure it; an aborted run leaves what the last checkpoint holds."""
    if ending == "abort":
        return Result("aborted", f"aborted at step {loop.step}; checkpoint of step {max(0, loop.saved_step)} is kept")
    if loop.step == 0:
        return Result("stopped", "stopped before the first step: there is nothing to save")
    path = checkpoint.write_adapter(job.folder, loop.loaded.model, _base_name(job, folder), folder)
    yield Saved(loop.step, path.name, checkpoint.folder_bytes(path), "adapter")
    if ending == "stop":
        return Result("stopped", f"stopped and saved at step {loop.step} of {loop.total}", path.name)
    yield from loop.holdout.measure(loop.step, loop.loaded, loop.fence)
    reason = f"all {loop.total} steps" if ending == "done" else f"time was up at step {loop.step} of {loop.total}"
    return Result("done", reason, path.name)


def _base_name(job: Job, folder: Path) -> str:
    """Return what the adapter names as its base: the hub id, or the folder that holds the weights."""
    name = job.run.model_name_or_path
    return str(folder.resolve()) if name.startswith(BUILTIN) or Path(name).is_dir() else name


def _teller(say: Callable[[Event], object], phase: PhaseName, unit: str) -> Callable[[int, int], None]:
    """Return a progress callback that journals at most four times a second, and the last one always."""
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.25 or done >= total:
            last = now
            say(Phase(phase, "progress", done=done, total=total, unit=unit))

    return tell


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes()
