"""What lies ahead of a run: the time to its end, from the rows that will come and from what was measured so far.

The order of the rows is known, so the work of every step to come is too; what a step takes of the clock is measured between
events, with all that happens beside its arithmetic. Measurements, checkpoints and samples are timed for themselves and counted
by their timetable; pauses are left out. Before the first steps it rests on real steps of an earlier run, on the rehearsal, or on the
first measurement of the held-out rows, in this order.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

from qlora_tui.engine import forecast, lengthy, measured
from qlora_tui.engine.data import lengths_of
from qlora_tui.engine.events import Event, Finding, Forecast, Phase, Stepped
from qlora_tui.engine.measured import Around
from qlora_tui.engine.pace import Pace, Triple
from qlora_tui.engine.rehearse import Rehearsed
from qlora_tui.engine.sizes import checkpointed_layers
from qlora_tui.engine.steptime import micro_batch, optimizer_seconds
from qlora_tui.engine.timetable import EVALS, LAST_WORDS, SAVES, cadence, measurements, saves
from qlora_tui.engine.train.choices import Choices
from qlora_tui.engine.train.limits import SAVING_SECONDS
from qlora_tui.engine.train.loop import Loop
from qlora_tui.engine.units import count, words

T = TypeVar("T")

_ASIDE = {"eval", "save", "sample", "pause"}
_HOT = "heat"
_RECENT, _LENGTHS = 3, 500
_TELL_SECONDS = 1.0
_ADAPTER_ON = (1.0, 1.2, 1.55)  # times the base's measurement that one with the adapter takes: it starts half as many kernels more
_REHEARSED, _MEASURED_ONCE = (0.88, 1.15), (0.7, 1.4)  # ranges of what one batch, and one measurement of the hold-out, say of all steps
_PICKED_AT, _LEAST_PICKED = 20, 40  # a step at which enough is measured to pick steps anew; before it never fewer than these


@dataclass(slots=True)
class Load:
    """What arithmetic expects of the rows of a step, in seconds; in tokens where the device's speed is not known."""

    choices: Choices
    rounded: Sequence[int] = ()  # row lengths, or sums of those that lie end to end, that are told apart where batches are recorded
    update: float | None = None  # seconds of the optimizer, where they were measured
    _known: dict[tuple[int, float], float] = field(default_factory=dict)

    @property
    def in_seconds(self) -> bool:
        """Whether anything is known of the device's speed."""
        return forecast.speed_of(self.choices.machine) is not None

    def of(self, lengths: Sequence[int], at_once: int, *, update: bool = True) -> float:
        """Return the work of a step, or without `update` of its batches alone; they are made as training makes them."""
        batches = sum(map(self._batch, self._shapes(lengths, at_once)))
        return batches + (self._update() if update else 0.0)

    def shapes(self, lengths: Sequence[int], at_once: int) -> set[tuple[int, float]]:
        """Return the shapes of the batches of a step, where batches are recorded: each costs a recording at its first sight."""
        return set(self._shapes(lengths, at_once)) if self.rounded else set()

    def _shapes(self, lengths: Sequence[int], at_once: int) -> Iterator[tuple[int, float]]:
        """Yield rows and tokens a row of each batch of a step: of the longest where they are padded, of the mean where none is."""
        ordered = sorted(lengths, reverse=True)
        for start in range(0, len(ordered), at_once):
            part = ordered[start : start + at_once]
            packed = self.choices.run.packing == "on"
            yield len(part), self._round(sum(part)) / len(part) if packed else self._round(part[0])

    def recording(self) -> float:
        """Return the seconds of recording a batch of the mean row."""
        return forecast.recording_seconds(
            self.choices.model, self.choices.run, self.choices.machine, statistics.fmean(self.choices.lengths)
        )

    def _batch(self, shape: tuple[int, float]) -> float:
        if shape not in self._known:
            self._known[shape] = self._expected(*shape)
        return self._known[shape]

    def _round(self, tokens: int) -> int:
        return next((size for size in self.rounded if size >= tokens), tokens)

    def _expected(self, rows: int, length: float) -> float:
        model, run, machine = self.choices.model, self.choices.run, self.choices.machine
        speed = forecast.speed_of(machine)
        if speed is None:
            return float(rows * length)
        return micro_batch(model, run, machine, speed, rows, length).seconds(checkpointed_layers(model, run))

    def _update(self) -> float:
        if self.update is None:
            speed = forecast.speed_of(self.choices.machine)
            self.update = optimizer_seconds(self.choices.model, self.choices.run, speed) if speed else 0.0
        return self.update


@dataclass(slots=True)
class Ahead:
    """Follows a run and says after every step how long it will still take."""

    choices: Choices
    loop: Loop
    rehearsed: Rehearsed | None = None
    clock: Callable[[], float] = time.monotonic
    pace: Pace = field(default_factory=Pace)
    spent: dict[str, list[float]] = field(default_factory=dict)  # seconds of each measurement, checkpoint, sample, and pause for heat
    base: float = 0.0  # seconds of what was measured before the first step
    wanted: int = 0  # steps that the config asks for, where `until` leaves room for fewer
    _load: Load | None = None
    _began: float = 0.0
    _mark: float = 0.0
    _first: int = 0
    _told: float = 0.0
    _told_long: bool = False
    _open: dict[str, float] = field(default_factory=dict)
    _beside: dict[str, float] = field(default_factory=dict)
    timed: list[tuple[int, int, float]] = field(default_factory=list)  # tokens, rows and seconds of each step that recorded nothing
    _works: tuple[tuple[int, int], list[float]] = ((-1, 0), [])
    _recorded: int = 0
    _recordings: list[tuple[float, float, int]] = field(default_factory=list)  # work, seconds and recordings of steps that made some
    _shapes: set[tuple[int, float]] = field(default_factory=set)  # of batches in this epoch
    _seen: set[tuple[int, float]] = field(default_factory=set)  # of batches so far

    def follow(self, work: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Pass on what `work` says, and add how long the rest takes."""
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            now = self.clock()
            yield event
            match event:
                case Phase(name="train", state="begin"):
                    self._begin(now)
                    yield from self._tell(self.loop.step, self.loop.step)
                case Phase(name=name) if name in _ASIDE:
                    self._phase(event, now)
                case Stepped():
                    self._step(event, now)
                    yield from self._tell(event.step, event.step - 1)
                    yield from self._fit_again(event.step)

    def _begin(self, now: float) -> None:
        """Take what was timed before the first step for what is known; a measurement of the base is its own kind."""
        self._know_base()
        self._began = self._mark = now
        self._first = self.loop.step
        self._beside, self._recorded = {}, self.loop.gradient.recordings

    def _know_base(self) -> None:
        self.base = self._beside.pop("eval", self.base)
        self.spent |= {kind: [seconds] for kind, seconds in self._beside.items() if kind == "save"}

    def _phase(self, event: Phase, now: float) -> None:
        """Time what lies beside training; a pause for heat will come again, one that was asked for will not."""
        if event.state == "begin":
            kind = _HOT if event.name == "pause" and self.loop.limits.run.max_temperature and "°C" in event.note else event.name
            self._open[kind] = now
        elif event.state == "end":
            kind = event.name if event.name in self._open else _HOT
            self._beside[kind] = self._beside.get(kind, 0.0) + now - self._open.pop(kind, now)

    def _step(self, event: Stepped, now: float) -> None:
        """Take in a step: all that passed since the one before, but for what lies beside it."""
        lengths = self.loop.order.lengths(event.step)
        work, seconds = self._of(lengths), now - self._mark - sum(self._beside.values())
        self._seen |= self._loaded().shapes(lengths, self.loop.gradient.halving.rows)
        new, self._recorded = self.loop.gradient.recordings - self._recorded, self.loop.gradient.recordings
        if new > 0:
            self._recordings.append((work, seconds, new))
        else:
            self.pace.feed(seconds, event.tokens, work)
            self.timed.append((event.tokens, len(event.rows), event.seconds))
        for kind, seconds in self._beside.items():
            self.spent.setdefault(kind, []).append(seconds)
        self._beside, self._mark = {}, now

    def _tell(self, step: int, behind: int) -> Generator[Event, None, None]:
        """Say how long it takes: after each of the first steps, then once a second, since reckoning costs a millisecond or two."""
        early, now = step - self._first <= _PICKED_AT, self.clock()
        if not early and now - self._told < _TELL_SECONDS and step < self.loop.total:
            return
        self._told, found = now, self.left(step, behind)
        if found is None:
            return
        yield found
        sure = found.seconds_left[0] > lengthy.LONG_EPOCH if step == self._first else step - self._first == _PICKED_AT
        if sure and not self._told_long:
            yield from self._long(step, self._mark - self._began + found.seconds_left[1])

    def _long(self, step: int, seconds: float) -> Generator[Event, None, None]:
        """Say once that the run takes long, at its beginning or once steps are measured, and what would make it shorter."""
        loop, choices = self.loop, self.choices
        lengths, held = loop.order.row_lengths, lengths_of(loop.holdout.rows)
        some = sorted(lengths[:: max(1, len(lengths) // _LENGTHS)])
        work = forecast.Work(sum(lengths), loop.total, loop.order.per_epoch, sum(held), some, len(lengths), len(held))
        found = lengthy.finding(choices.model, choices.asked, choices.run, choices.machine, work, step, seconds)
        if found is not None:
            self._told_long = True
            yield found

    def left(self, step: int, behind: int, *, capped: bool = True) -> Forecast | None:
        """Return the time from after `step` to the end, what comes after the last step included; None where nothing is known yet.

        What belongs beside the steps after `behind` is still to come: a step is told before it is measured and saved.
        """
        steps, work = self._to_come(step)
        training, basis = self.pace.left(steps, work), ""
        if training is not None:
            basis = self.pace.basis
        elif (prior := self.prior()) is not None:
            (low, middle, high), basis = prior
            training = (work * low, work * middle, work * high)
        if training is None:
            return None
        beside = self._beside_training(behind)
        most = self._most() if capped else math.inf
        low, middle, high = (min(one, most) + other for one, other in zip(training, beside, strict=True))
        return Forecast((low, middle, high), basis)

    def fit(self) -> Generator[Event, None, None]:
        """Before the first step: give the run as many steps as fit before `until`, so that its learning rate has come to its end by then.

        Picked by what is expected, since little is known yet; `_fit_again` picks by what was measured. A run that was begun
        earlier keeps its steps: its schedule stays.
        """
        self._know_base()
        if self.loop.run.until and not self.loop.step:
            yield from self._pick(0, 0, 1)

    def _fit_again(self, step: int) -> Generator[Event, None, None]:
        if step == _PICKED_AT and self.wanted and step < self.loop.total:
            yield from self._pick(step, step - 1, 2)

    def _pick(self, step: int, behind: int, place: int) -> Generator[Event, None, None]:
        """Take the most steps whose time ends by `until`: that at `place` of (low, mid, high)."""
        loop, before = self.loop, self.loop.total
        self.wanted, available = self.wanted or before, loop.limits.deadline.left() - SAVING_SECONDS

        def fits(total: int) -> bool:
            loop.total = total
            found = self.left(step, behind, capped=False)
            return found is None or found.seconds_left[place] <= available

        least, most = step or _LEAST_PICKED, self.wanted
        loop.total = before
        if most <= least or fits(most):
            loop.total = most if most > least else before
        else:
            loop.total = max(least, bisect.bisect_left(range(least + 1, most), True, key=lambda total: not fits(total)) + least)
        if loop.total == before:
            return
        there = words(max(0.0, available + SAVING_SECONDS))
        told = f"until {loop.run.until} there is {there}: {count(loop.total)} of {count(self.wanted)} steps fit"
        numbers = {"total": loop.total, "wanted": self.wanted, "left_seconds": available}
        yield Finding("until", "info", step, f"{told}, and the learning rate comes to its end by then", (), numbers)

    def around(self, load_seconds: float) -> Around | None:
        """Return what lay around the steps, to be remembered; None where the hold-out was never measured, or nothing saved."""
        tokens = sum(lengths_of(self.loop.holdout.rows))
        took = self._beside.get("eval") or self.base
        return Around(load_seconds, self._usual("save"), took / tokens) if tokens else None

    def prior(self) -> tuple[Triple, str] | None:
        """Return the seconds of one unit of work as (low, mid, high) before any step is measured, and what they rest on."""
        model, run, machine = self.choices.model, self.choices.run, self.choices.machine
        speed, load = forecast.speed_of(machine), self._loaded()
        if speed is None:
            return None
        factor, spread = forecast.against_steps(model, run, machine, speed, statistics.fmean(self.choices.lengths))
        if spread is not None:
            return (factor * spread[0], factor, factor * spread[1]), "steps measured on this machine"
        if self.rehearsed is not None:
            longest = -(-self.rehearsed.tokens // self.rehearsed.rows)
            factor = self.rehearsed.seconds["train"] / load.of([longest] * self.rehearsed.rows, self.rehearsed.rows, update=False)
            return (factor * _REHEARSED[0], factor, factor * _REHEARSED[1]), "the rehearsal"
        if expected := self._measuring_work():
            factor = self.base / expected if self.base else 1.0
            return (factor * _MEASURED_ONCE[0], factor, factor * _MEASURED_ONCE[1]), "the first measurement of the held-out rows"
        return None

    def _measuring_work(self) -> float:
        """Return the work of measuring the hold-out; 0 where it was not measured before the first step."""
        loop = self.loop
        if not self.base or not loop.holdout.rows:
            return 0.0
        share = forecast.forward_share(self.choices.model, self.choices.run)
        return share * self._loaded().of(lengths_of(loop.holdout.rows), loop.holdout.halving.rows, update=False)

    def _beside_training(self, step: int) -> Triple:
        """Return the seconds of measurements, checkpoints, samples, pauses for heat and the last words after `step`."""
        run, total = self.loop.run, self.loop.total
        every, keep = cadence(run.eval_steps, total, EVALS), cadence(run.save_steps, total, SAVES)
        times = measurements(step, total, every)
        least, most = saves(step, total, keep, every) if self.loop.holdout.rows else (saves(step, total, keep, total + 1)[0],) * 2
        saved, sampled = self._usual("save"), self._usual("sample") * times
        heat = self._usual(_HOT) * len(self.spent.get(_HOT, ())) * (total - step) / max(1, step)
        low, middle, high = (times * seconds for seconds in self._measuring())
        recording = self._recording_to_come()
        low, middle, high = low + 0.5 * recording, middle + recording, high + 2 * recording
        return (
            low + least * saved * 0.8 + sampled * 0.8 + LAST_WORDS[0] + saved * 0.5,
            middle + most * saved + sampled + heat + LAST_WORDS[1] + saved,
            high + most * saved * 1.3 + sampled * 1.3 + heat * 1.5 + LAST_WORDS[2] + saved * 2,
        )

    def _recording_to_come(self) -> float:
        """Return the seconds of recording batches of shapes that this epoch holds and that were not met yet."""
        coming = len(self._shapes - self._seen)
        if not coming:
            return 0.0
        made = sum(new for *_, new in self._recordings)
        if not made or self.pace.ordinary(1.0) is None:
            return coming * self._loaded().recording()
        took = sum(max(0.0, seconds - (self.pace.ordinary(work) or 0.0)) for work, seconds, _ in self._recordings)
        return coming * took / max(1, min(made, len(self._seen)))  # one shape may take several recordings, by what is trained of it

    def _measuring(self) -> Triple:
        """Return the seconds of one measurement of the hold-out."""
        known = self.spent.get("eval", ())[-_RECENT:]
        if known:
            usual = statistics.median(known)
            return 0.93 * usual, usual, 1.1 * usual
        before = measured.around(self.choices.machine.name, forecast.around_key(self.choices.model, self.choices.run))
        if before is not None and self.base:
            usual = max(self.base, before.eval_seconds_per_token * sum(lengths_of(self.loop.holdout.rows)))
            return max(self.base, 0.85 * usual), usual, 1.2 * usual
        return self.base * _ADAPTER_ON[0], self.base * _ADAPTER_ON[1], self.base * _ADAPTER_ON[2]

    def _usual(self, kind: str) -> float:
        """Return what one of `kind` takes; a checkpoint was written on trial before the first step."""
        known = self.spent.get(kind, ())[-_RECENT:]
        return statistics.median(known) if known else 0.0

    def _most(self) -> float:
        """Return the seconds of training that `max_time` and `until` leave."""
        limits = self.loop.limits
        after = self.loop.run.max_time - (self.clock() - self._began) if self.loop.run.max_time else math.inf
        return max(0.0, min(after, limits.deadline.left()))

    def _to_come(self, step: int) -> tuple[int, float]:
        """Return how many steps come after `step`, and their work: that of this epoch's own rows, and of whole epochs after it."""
        order, steps = self.loop.order, self.loop.total - step
        if steps <= 0:
            return 0, 0.0
        key = (step // order.per_epoch, self.loop.gradient.halving.rows)
        if self._works[0] != key:
            rows = order.epoch(step + 1)
            self._works = key, [0.0, *accumulate(map(self._of, rows))]
            self._shapes = set().union(*(self._loaded().shapes(lengths, key[1]) for lengths in rows))
        sums, at = self._works[1], step % order.per_epoch
        here = min(steps, order.per_epoch - at)
        return steps, sums[at + here] - sums[at] + sums[-1] * (steps - here) / order.per_epoch

    def _of(self, lengths: Sequence[int]) -> float:
        return self._loaded().of(lengths, self.loop.gradient.halving.rows)

    def _loaded(self) -> Load:
        if self._load is None:
            graphs = self.loop.gradient.graphs
            update = self.rehearsed.seconds["optimizer"] if self.rehearsed else None
            self._load = Load(self.choices, () if graphs is None else graphs.sizes, update)
        return self._load
