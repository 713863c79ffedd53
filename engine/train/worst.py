"""The worst batch first: rehearsed before step 1, and made leaner until it fits where the config leaves that open."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch

from qlora_tui.engine import measured
from qlora_tui.engine.data import Tokenized
from qlora_tui.engine.events import Event, Finding, Phase, Planned
from qlora_tui.engine.load import settle_layers
from qlora_tui.engine.meter import empty_cache, out_of_memory, said
from qlora_tui.engine.rehearse import Cast, Rehearsed, pieces, rehearse
from qlora_tui.engine.spec import rows_at_once
from qlora_tui.engine.train.choices import Choices
from qlora_tui.engine.train.holdout import poll_for
from qlora_tui.engine.train.loop import Loop
from qlora_tui.engine.train.step import recorded
from qlora_tui.engine.units import gib


def worst_first(
    choices: Choices, loop: Loop, tokenized: Tokenized, planned: Callable[[], Planned], *, on_cpu: bool = False
) -> Generator[Event, None, Rehearsed | None]:
    """Run the worst batch first; what does not fit is made leaner where the config leaves that open, and told by `planned`.

    On CUDA unless `rehearsal` is off. On a CPU never: nothing there refuses memory, and it would cost a whole step.

    Raises:
        WontFit: it does not fit and no leaner choice is left.
    """
    cuda = loop.loaded.device.type == "cuda"
    if not choices.run.rehearsal or not (cuda or on_cpu):
        return None
    while True:
        began = time.monotonic()
        rehearsed, words, lacking = yield from _rehearse_once(choices, loop, tokenized)
        if rehearsed is not None:
            break
        empty_cache(loop.loaded.device)
        yield Phase("probe", "end", seconds=time.monotonic() - began, note=words)
        changes = choices.leaner()
        if not changes:
            raise choices.refuse(f"the rehearsal of the longest batch did not fit: {words}", lacking)
        _resize(loop, choices, tokenized)
        yield Finding("memory", "warn", 0, f"the rehearsal did not fit ({words}); now leaner: {changes}", (), {"lacking_bytes": lacking})
        yield planned()
    speed = pieces(loop.loaded, choices.model, loop.run, choices.machine) if cuda else None  # each time: a host is not always as fast
    if speed is not None:
        measured.remember_speed(choices.machine.name, measured.versions(), speed)
    return rehearsed


def _rehearse_once(choices: Choices, loop: Loop, tokenized: Tokenized) -> Generator[Event, None, tuple[Rehearsed | None, str, int]]:
    """Return what was measured; or None, what went wrong, and how many bytes the estimate was measured to be too low, if known."""
    run = choices.run
    cast = Cast(
        loaded=loop.loaded,
        optimizer=loop.optimizer,
        train_rows=tokenized.train,
        eval_rows=tokenized.holdout,
        add=loop.gradient.add,
        clear=loop.gradient.clear,
        rows_at_once=rows_at_once(run),
        warm=1 if loop.gradient.graphs is None else 2,
        repeats=run.gradient_accumulation_steps,
        chunk=run.loss_chunk_size,
        excursion=loop.fence.excursion,
        beside=loop.gradient.beside,
        poll=lambda: poll_for(loop.wishes),
    )
    try:
        rehearsed = yield from rehearse(cast, loop.meter)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None, said(error), 0
    needed = max(rehearsed.peaks.values())
    if needed <= choices.free_bytes:
        return rehearsed, "", 0
    words = f"it needs {gib(needed)} and {gib(choices.free_bytes)} are free"
    return None, words, max(1, needed - choices.plan.budget.total_bytes)


def _resize(loop: Loop, choices: Choices, tokenized: Tokenized) -> None:
    """Give a loop that has not begun the leaner choices."""
    run = loop.run = choices.run
    layers = loop.loaded.decoder.layers
    assert isinstance(layers, torch.nn.ModuleList)
    settle_layers(run, layers, loop.loaded.device)
    loop.gradient.halving.rows = loop.holdout.halving.rows = rows_at_once(run)
    loop.gradient.record(loop.order if recorded(run, loop.loaded) else None)
    loop.gradient.chunk = loop.holdout.chunk = run.loss_chunk_size
    loop.meter.predicted = choices.predicted()
