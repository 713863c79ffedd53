"""A run from its first phase to its adapter: fetch, data, plan, load, sift, rehearse, measure, train, measure, save.

`train` yields everything that happens and does no printing; `session` owns the thread it runs in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from qlora_tui.engine import builtin, fixes, hub
from qlora_tui.engine.adapters import Chosen
from qlora_tui.engine.batches import Order, steps_per_epoch
from qlora_tui.engine.data import Dataset, Tokenized, load_tokenizer, prepare
from qlora_tui.engine.errors import ConfigError, DataError, ModelError, Stopped
from qlora_tui.engine.events import Event, Phase, PhaseName, Planned, Prepared, Wishes
from qlora_tui.engine.export import planned as exports
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.load import Loaded, attend_without_mask, choose_dtype, load, trainable
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.meter import Meter, out_of_memory
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import discard
from qlora_tui.engine.rates import Rates, planned
from qlora_tui.engine.spec import BUILTIN, RunConfig, rows_at_once, rows_per_step
from qlora_tui.engine.steptime import sees_whole_rows
from qlora_tui.engine.text import one_line
from qlora_tui.engine.timetable import EVALS, SAVES, cadence
from qlora_tui.engine.train import verdict
from qlora_tui.engine.train.ahead import Ahead
from qlora_tui.engine.train.attention import tell_kernel
from qlora_tui.engine.train.checks import checks_of
from qlora_tui.engine.train.choices import Choices, choose
from qlora_tui.engine.train.ending import Result, finish, measure_again
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import Holdout, poll_for
from qlora_tui.engine.train.keeper import Keeper
from qlora_tui.engine.train.limits import Limits
from qlora_tui.engine.train.loop import Loop
from qlora_tui.engine.train.optim import build_optimizer, choose_optimizer, flatten
from qlora_tui.engine.train.parking import FOLDER
from qlora_tui.engine.train.resume import origin, resume
from qlora_tui.engine.train.samples import Samples
from qlora_tui.engine.train.scale import LossScale
from qlora_tui.engine.train.schedule import total_steps, warmup_steps
from qlora_tui.engine.train.step import Gradient, Halving, Thrash, recorded
from qlora_tui.engine.train.triage import Triage
from qlora_tui.engine.train.worst import worst_first
from qlora_tui.engine.units import gib
from qlora_tui.engine.until import Deadline
from qlora_tui.engine.watch import Setting, Watch
from qlora_tui.engine.watch.attention import NOT_ON_A_CPU

DROPPED = "dropped.jsonl"
"""In the run folder: the rows that are not used, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked run: what `preflight` found, where to write, whom to listen to.

    `say` journals what a callback deep inside a download or the tokenizer has to tell, where a generator cannot yield.
    `scores_alone` ends it before the first step, once the base has scored the answers: a person wants to see them first.
    `measured` is the adapter of another run that is measured instead: nothing is trained, and what is left open is chosen as there.
    `rehearse_on_cpu` is for tests: a processor has no hard limit to find out about, and a rehearsal costs it a whole step.
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
    scores_alone: bool = False
    measured: Chosen | None = None
    rehearse_on_cpu: bool = False


def train(job: Job) -> Generator[Event, None, Result]:
    """Run `job`, one event at a time.

    Raises:
        WontFit: the card ran out of memory; what to change is named.
        EngineError: anything else that ends a run, in one sentence.
    """
    try:
        result = yield from _train(job)
        if result.outcome == "done" and not job.scores_alone:
            yield from exports.at_the_end(job.run, job.folder, lambda: poll_for(job.wishes), job.say)
        return result
    except Stopped:
        outcome: Literal["stopped", "aborted"] = "aborted" if job.wishes.urgent() == "abort" else "stopped"
        return Result(outcome, f"{outcome} before the first step: there is nothing to save")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        told = fixes.refusal(job.model_spec, job.run, job.machine, "the device ran out of memory")
        raise told from error.with_traceback(None)  # the frames would keep the tensors alive


def _train(job: Job) -> Generator[Event, None, Result]:
    folder = yield from _fetch(job)
    tokenized = yield from _data(job, folder)
    choices = yield from _plan(job, tokenized)
    device = torch.device("cuda", 0) if job.machine.kind == "cuda" else torch.device("cpu")
    _limit_memory(device, choices)
    meter = Meter(device, job.machine, choices.predicted())
    began = time.monotonic()
    yield Phase("load", "begin", note=job.run.model_name_or_path)
    with meter.phase("load", fresh=True):
        loaded = load(choices.run, folder, job.machine)
    if device.type == "cuda" and sees_whole_rows(choices.model, choices.run, max(choices.lengths)):
        attend_without_mask(loaded)
    if job.run.packing == "on" and not loaded.packs:
        raise ConfigError(f"packing=on: rows lie end to end for fused layers only: {loaded.why_plain}", hint="say packing=auto, or off")
    note = NOT_ON_A_CPU if device.type == "cpu" else _layers_told(loaded, padded=choices.run.packing == "on")
    yield Phase("load", "end", seconds=time.monotonic() - began, note=note, **meter.told("load"))
    fence = Fence(loaded)
    if choices.run.perplexity_filter:
        tokenized = yield from _sift(job, choices, loaded, fence, folder, tokenized, meter)
    if job.scores_alone:
        return Result("done", "the base has scored the answers")
    loop = _loop(job, choices, loaded, fence, tokenized, meter, folder)
    if job.measured is not None:
        return (yield from measure_again(loop, job.measured))
    planned = partial(_planned, job, choices)
    rehearsed = yield from worst_first(choices, loop, tokenized, partial(planned, loop.total), on_cpu=job.rehearse_on_cpu)
    yield from tell_kernel(choices.run, loaded, loop.fence, tokenized.facts.max_row_tokens, job.model_spec.head_dim)
    if job.resume:
        yield from resume(job.folder, loop, read_records(job.folder / EVENTS))
    ahead, taken = Ahead(choices, loop, rehearsed), time.monotonic() - began
    result = yield from ahead.follow(_through(job, ahead, folder, planned))
    choices.remember(meter, ahead.timed, rehearsed, ahead.around(taken), halved=loop.gradient.halving.times > 0)
    return result


def _layers_told(loaded: Loaded, *, padded: bool) -> str:
    """Say how layers run; where they could not be fused after all, rows that were to lie end to end are `padded`."""
    plain = f"layers run as transformers has them{', and rows are padded' if padded else ''}: {loaded.why_plain}"
    wide = f"; gradients are multiplied in 16 bits: {loaded.why_wide}" if loaded.why_wide else ""
    return (plain if loaded.why_plain else "layers are fused") + wide


def _through(job: Job, ahead: Ahead, folder: Path, planned: Callable[[int], Planned]) -> Generator[Event, None, Result]:
    """Prove the disk, measure the base, pick the steps that `until` leaves, train and finish: what a forecast counts."""
    loop, total = ahead.loop, ahead.loop.total
    yield from loop.keeper.prove(loop.state())
    yield from verdict.measure_base(loop)
    yield from ahead.fit()
    if loop.total != total:
        loop.watch = _watch(loop.run, loop.total)
        yield planned(loop.total)
    with loop.meter.phase("train", fresh=True):
        ending = yield from loop.train()
    return (yield from finish(job.run, loop, folder, ending))


def _watch(run: RunConfig, total: int) -> Watch:
    return Watch(Setting(total, warmup_steps(run, total), rows_per_step(run)), run.watch_stop, run.watch_rollback)


def _limit_memory(device: torch.device, choices: Choices) -> None:
    """Hold the allocator to what `memory_limit_gib` leaves once CUDA's context, which it does not count, has its part."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    room = choices.free_bytes - choices.plan.budget.bytes_of("context")
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, room / total)) if choices.run.memory_limit_gib else 1.0, device)


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
        load_tokenizer(folder, job.run.chat_template).claim(),
        eval_dataset=job.eval_dataset,
        stopping=lambda: poll_for(job.wishes),
        progress=_teller(job.say, "data", "rows"),
    )
    tokenized.write_lost(job.folder / DROPPED)
    yield Phase("data", "end", seconds=time.monotonic() - began)
    if not tokenized.train:
        raise DataError("no row is left to train on", hint="see the reasons above; a larger max_length or other data would help")
    _check_ids(job, tokenized)
    return tokenized


def _check_ids(job: Job, tokenized: Tokenized) -> None:
    """Refuse tokens that the embedding has no row for: on a GPU they end the process in an assertion nobody understands."""
    highest = tokenized.highest
    size = job.model_spec.vocab_size
    if highest >= size:
        raise ModelError(
            f"its tokenizer makes token {highest} of these rows and the model ends at {size - 1}: they do not belong together",
            where=one_line(job.run.model_name_or_path),
            hint="take the tokenizer files that came with the model",
        )


def _plan(job: Job, tokenized: Tokenized) -> Generator[Event, None, Choices]:
    """Choose what the config leaves open, now that the rows are known, and say what will be trained and what it will take."""
    began = time.monotonic()
    yield Phase("plan", "begin")
    lengths = tokenized.lengths
    known = job.measured.folder if job.measured else job.folder if job.resume else None
    past = read_records(known / EVENTS) if known else []
    choices = choose(job.model_spec, job.run, job.machine, lengths, past)
    yield Phase("plan", "end", seconds=time.monotonic() - began)
    yield _prepared(job, choices.run, tokenized)
    yield _planned(job, choices, _total(choices.run, tokenized))
    _check_changes(choices.run, _total(choices.run, tokenized))
    if choices.hopeless:
        raise choices.refuse(f"this run needs about {gib(choices.plan.budget.total_bytes)}")
    return choices


def _check_changes(run: RunConfig, total: int) -> None:
    """Refuse changes of the learning rate that no step would meet; how many steps there are is known only now."""
    late = [change.text for change in planned(run.learning_rate_changes) if change.step > total]
    if late:
        raise ConfigError(f"learning_rate_changes: {late[0]} comes after the last step, {total}", hint="leave it out")


def _prepared(job: Job, run: RunConfig, tokenized: Tokenized) -> Prepared:
    facts = tokenized.facts
    return Prepared(
        format=job.dataset.format,
        why=job.dataset.why,
        rows=len(job.dataset.rows) + len(job.dataset.refused),
        train_rows=len(tokenized.train),
        holdout_rows=len(tokenized.holdout),
        tokens=facts.tokens,
        supervised_tokens=facts.supervised_tokens,
        steps_per_epoch=steps_per_epoch(len(tokenized.train), rows_per_step(run)),
        total_steps=_total(run, tokenized),
        refused=facts.refused,
        dropped=facts.dropped,
        max_row_tokens=facts.max_row_tokens,
        notes=facts.notes,
    )


def _planned(job: Job, choices: Choices, total: int) -> Planned:
    run = choices.run
    return choices.planned(
        dtype=str(choose_dtype(run, job.machine)).removeprefix("torch."),
        optim=choose_optimizer(run, torch.device(job.machine.kind)),
        eval_steps=cadence(run.eval_steps, total, EVALS),
        save_steps=cadence(run.save_steps, total, SAVES),
        warmup_steps=warmup_steps(run, total),
    )


def _total(run: RunConfig, tokenized: Tokenized) -> int:
    return total_steps(run, steps_per_epoch(len(tokenized.train), rows_per_step(run)))


def _sift(
    job: Job, choices: Choices, loaded: Loaded, fence: Fence, folder: Path, tokenized: Tokenized, meter: Meter
) -> Generator[Event, None, Tokenized]:
    """Leave out the answers that the base knows, list them, and say anew what will be trained."""
    run, began = choices.run, time.monotonic()
    triage = Triage(
        run=run,
        folder=job.folder,
        weights=folder,
        device_name=job.machine.name,
        loaded=loaded,
        fence=fence,
        halving=Halving("the triage", rows_at_once(run), loaded.device, choices.refuse),
        wishes=job.wishes,
        say=job.say,
        progress=_teller(job.say, "data", "rows"),
    )
    yield Phase("data", "begin", note="how well the base knows each answer")
    with meter.phase("data", fresh=True):
        left = triage.sift(tokenized)
    left.write_lost(job.folder / DROPPED)
    yield Phase("data", "end", seconds=time.monotonic() - began, **meter.told("data", predicted="eval"))
    yield _prepared(job, run, left)
    if (total := _total(run, left)) != _total(run, tokenized):
        yield _planned(job, choices, total)
    return left


def _loop(job: Job, choices: Choices, loaded: Loaded, fence: Fence, tokenized: Tokenized, meter: Meter, folder: Path) -> Loop:
    run, total, device = choices.run, _total(choices.run, tokenized), loaded.device
    halving = partial(Halving, rows=rows_at_once(run), device=device, refuse=choices.refuse)
    flat = flatten(run, trainable(loaded.model), device)
    optimizer = build_optimizer(run, flat, device)
    fence.attach(optimizer, flat)
    discard(job.folder / FOLDER)  # a pause that was killed
    loaded.model.train()
    gradient = Gradient(loaded, flat, halving("training"), run.loss_chunk_size, Thrash(device), LossScale.of(loaded.dtype))
    order = Order(tokenized.train, rows_per_step(run), run.seed)
    gradient.record(order if recorded(run, loaded) else None)
    samples = _samples(job, run, loaded, fence, tokenized, meter, folder)
    holdout = Holdout(
        job.folder, tokenized.holdout, halving("evaluation"), run.loss_chunk_size, meter, job.wishes, gradient.beside, samples.told
    )
    return Loop(
        run=run,
        loaded=loaded,
        gradient=gradient,
        optimizer=optimizer,
        order=order,
        holdout=holdout,
        meter=meter,
        watch=_watch(run, total),
        fence=fence,
        wishes=job.wishes,
        limits=Limits(run, Deadline(run.until)),
        keeper=Keeper(job.folder, run.save_total_limit, loaded.model, optimizer, meter),
        samples=samples,
        checks=checks_of(run, tokenized.train, tokenized.holdout),
        rates=Rates(planned(run.learning_rate_changes)),
        origin=origin(job.run, chain(tokenized.train, tokenized.holdout), folder, job.model_files.commit),
        total=total,
    )


def _samples(job: Job, run: RunConfig, loaded: Loaded, fence: Fence, tokenized: Tokenized, meter: Meter, folder: Path) -> Samples:
    dataset = job.eval_dataset or job.dataset
    read = partial(load_tokenizer, folder, run.chat_template)
    return Samples(run, loaded, fence, meter, job.wishes, tokenized.holdout, dataset, read)


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
