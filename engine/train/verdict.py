"""What becomes of a finding: told, the run ended with a diagnostic checkpoint, or taken back to the last healthy one.

Before a run is stopped for its loss or gradient, the held-out rows are asked: a change of the data leaves them alone, an ill
model does not. A roll back restores tensors, random numbers and detectors, halves the learning rate, and happens at most
`MOST_ROLLBACKS` times by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_tui.engine import checkpoint, shelf
from qlora_tui.engine.errors import Diverged
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.events import Evaluated, Event, Finding, Finished, Record, RolledBack, Stepped
from qlora_tui.engine.load import trainable
from qlora_tui.engine.rates import Change
from qlora_tui.engine.resume import rate_changes
from qlora_tui.engine.watch import HeldRow

if TYPE_CHECKING:
    from qlora_tui.engine.train.loop import Loop

MOST_ROLLBACKS = 2
_MOVED_BY = 3  # after two applied steps every B must differ from zero


def judge(loop: Loop, stepped: Stepped) -> Iterator[Event]:
    """Ask the detectors about a step, and do what the user chose.

    Raises:
        Diverged: the watch stopped the run; a diagnostic checkpoint was saved.
    """
    found = loop.watch.see(stepped)
    if stepped.step == _MOVED_BY and not stepped.skipped:
        matrices = {name: part for name, part in trainable(loop.loaded.model).items() if ".lora_B." in name}
        found += loop.watch.adapter(stepped.step, [name for name, part in matrices.items() if not bool(part.any())], len(matrices))
    if loop.watch.asks_holdout(found):
        found = yield from _asked(loop, found)
    yield from loop.keeper.judge(stepped.step, found, skipped=stepped.skipped)
    yield from act(loop, found)


def measured(loop: Loop, found: Evaluated) -> list[Finding]:
    """Return what the detectors say about the measurement that was just made."""
    return loop.watch.measured(found, held(loop.holdout.base if found.step == 0 else loop.holdout.newest))


def measure_base(loop: Loop) -> Iterator[Event]:
    """Measure the base, or read what an earlier attempt measured, and show it to the detectors of a run that begins."""
    yield from loop.holdout.measure_base(loop.loaded, loop.fence)
    if loop.step == 0 and loop.holdout.base:
        losses = loop.holdout.base
        mean = sum(row.nll for row in losses) / sum(row.tokens for row in losses)
        yield from told(measured(loop, Evaluated(0, mean, len(losses), 0.0)))


def held(losses: Sequence[RowLoss]) -> list[HeldRow]:
    """Return row losses as the detectors read them."""
    return [HeldRow(loss.mean, loss.tokens) for loss in losses]


def told(found: Sequence[Finding]) -> list[Finding]:
    """Return findings of a moment at which nothing is left to stop."""
    return [dataclasses.replace(finding, severity="warn") if finding.severity == "stop" else finding for finding in found]


def act(loop: Loop, found: Sequence[Finding]) -> Iterator[Event]:
    """Say what was found and do what the user chose about it.

    Raises:
        Diverged: the watch stopped the run; a diagnostic checkpoint was saved.
    """
    yield from found
    grave = next((finding for finding in found if loop.watch.action(finding) != "tell"), None)
    if grave is None:
        return
    yield from loop.save(kind="diagnostic")
    healthy = shelf.last_healthy(loop.holdout.folder)
    if loop.watch.action(grave) == "roll_back" and healthy is not None and loop.rolled_back < MOST_ROLLBACKS:
        times, rates = loop.rolled_back + 1, loop.rates.state()
        shelf.roll_back(loop.holdout.folder, shelf.step_of(healthy))
        loop.restore(checkpoint.restore(healthy, loop.loaded.model, loop.optimizer))
        loop.rates.restore(rates)  # what people changed on the way still counts
        loop.rates.halve()
        loop.rolled_back = times
        loop.holdout.forget(loop.step)
        yield RolledBack(loop.step, loop.rates.factor, times, grave.message)
        return
    raise Diverged(grave.message, hint=_offer(loop, grave), where=f"step {grave.step}")


def resumed_after_stop(loop: Loop, records: Sequence[Record]) -> Iterator[Event]:
    """Carry into a resume what the journal knows and the checkpoint cannot: a roll back after it, or a stop by the watch.

    A run is deterministic: going on exactly as before would end where it ended. So after a stop it goes on with half the
    learning rate, unless the resume no longer lets that detector stop it.
    """
    place, back = next(((at, one.event) for at, one in reversed([*enumerate(records)]) if isinstance(one.event, RolledBack)), (0, None))
    if back is not None and back.to_step >= loop.step:
        loop.rolled_back, loop.rates.factor = back.times, back.rate_factor
        loop.rates.done = _counted(loop.rates.coming, records[:place])
    loop.rates.coming += rate_changes(records)
    if stopped_by(records) in loop.watch.acting:
        loop.rates.halve()
        yield RolledBack(loop.step, loop.rates.factor, loop.rolled_back, "the watch stopped the last attempt")


def _counted(planned: Sequence[Change], records: Sequence[Record]) -> list[str]:
    """Return the ids of changes of the learning rate that a roll back at the end of `records` has in its own factor."""
    last = next((record.event.step for record in reversed(records) if isinstance(record.event, Stepped)), 0)
    return [change.id for change in (*planned, *rate_changes(records)) if change.step <= last + 1]


def stopped_by(records: Sequence[Record]) -> str:
    """Return the detector that ended the last attempt, or nothing."""
    last = next((record.event for record in reversed(records) if isinstance(record.event, Finished)), None)
    if last is None or last.outcome != "diverged":
        return ""
    findings = (record.event for record in reversed(records) if isinstance(record.event, Finding))
    return next((finding.detector for finding in findings if finding.severity == "stop"), "")


def _asked(loop: Loop, found: list[Finding]) -> Generator[Event, None, list[Finding]]:
    """Measure the hold-out now and return the findings in its light."""
    for event in loop.holdout.measure(loop.step, loop.loaded, loop.fence):
        yield event
        if isinstance(event, Evaluated):
            rows = held(loop.holdout.newest)
            return [*loop.watch.weighed(found, rows), *measured(loop, event)]
    return found


def _offer(loop: Loop, grave: Finding) -> str:
    """Return what a person can do now: go back with half the rate, where there is something to go back to."""
    healthy = shelf.last_healthy(loop.holdout.folder)
    rows = grave.numbers.get("rows") or ()
    looked = f"; rows {', '.join(map(str, rows[:8]))} were in the bad steps" if rows else ""
    if healthy is None:
        first = grave.advice[0] if grave.advice else "half the learning rate"
        return f"no checkpoint is known to be healthy: start again with {first}{looked}"
    name, step = loop.holdout.folder.name, shelf.step_of(healthy)
    return f"qlora-tui --resume {name} goes back to step {step} with half the learning rate{looked}"
