"""The watch over a run that is over, or that another tool made: the same detectors, one moment after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch import HeldRow, Watch


@dataclass(frozen=True, slots=True)
class Held:
    """A measurement of the hold-out, with its rows where a log has them."""

    found: Evaluated
    rows: Sequence[HeldRow] = ()


@dataclass(frozen=True, slots=True)
class Back:
    """What came after `to_step` is void: a resume, or a roll back."""

    to_step: int


Moment = Stepped | Held | Back


@dataclass(slots=True)
class Replayed:
    """What the watch said; `stop_step` is where it would first have ended the run, or gone back."""

    steps: int = 0
    stop_step: int | None = None
    findings: list[Finding] = field(default_factory=list)


def replay(moments: Iterable[Moment], watch: Watch, *, on: bool = False) -> Replayed:
    """Let `watch` see a run, up to where it would have ended it; `on` goes on to the end of the log.

    As in the loop, a measurement made right after a step is asked before that step's findings count.
    """
    told = Replayed()
    for group in _groups(moments):
        found: list[Finding] = []
        for moment in group:
            if isinstance(moment, Stepped):
                found = watch.see(moment)
                told.steps += 1
            elif isinstance(moment, Held):
                found = watch.weighed(found, moment.rows) if watch.asks_holdout(found) else found
                found += watch.measured(moment.found, moment.rows)
        told.findings += found
        acts = [item.step for item in found if watch.action(item) != "tell"]
        if acts and told.stop_step is None:
            told.stop_step = acts[0]
            if not on:
                break
    return told


def _groups(moments: Iterable[Moment]) -> Iterator[list[Stepped | Held]]:
    """Yield each step together with the measurements made after it; what a later `Back` makes void is left out.

    One pass cannot know what is void before it has seen the end, so the moments of a log are held in memory: about a
    kilobyte each.
    """
    groups: list[list[Stepped | Held]] = []
    for moment in moments:
        if isinstance(moment, Back):
            groups = [group for group in groups if _step_of(group[0]) <= moment.to_step]
        elif isinstance(moment, Held) and groups and _step_of(groups[-1][0]) == moment.found.step:
            groups[-1].append(moment)
        else:
            groups.append([moment])
    yield from groups


def _step_of(moment: Stepped | Held) -> int:
    return moment.step if isinstance(moment, Stepped) else moment.found.step
