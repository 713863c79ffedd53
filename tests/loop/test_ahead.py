"""The time left, on a clock of the test's own: what lies beside training counts where it will come again, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loop_driver import CPU, Asked, Ran, drive

from qlora_tui.engine import forecast, measured, planner
from qlora_tui.engine.events import Event, Finding, Forecast, Phase, Saved, Stepped, Wish
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import from_folder
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import job
from qlora_tui.engine.train.ahead import Ahead, Load
from qlora_tui.engine.train.choices import Choices
from qlora_tui.engine.train.limits import Limits
from qlora_tui.engine.until import Deadline

Make = Callable[..., RunConfig]
STEPS, EVAL, SAVE, PAUSE = 40, 11.0, 3.0, 5000.0
BESIDE = {"eval": EVAL, "save": SAVE, "pause": PAUSE}
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "eval_steps": 10, "save_steps": 15, "num_train_epochs": 1.0}


class Ticking:
    """A clock that each event moves on by what the test says; remembers what was forecast when, and when all was over."""

    def __init__(self, step_seconds: Callable[[int], float] = lambda step: 2.0) -> None:
        self.now, self.began, self.step, self.step_seconds = 1000.0, 0.0, 0, step_seconds
        self.ends: dict[int, tuple[float, float, float]] = {}  # by step: when the run would end, by the forecast after it

    def passes(self, work: Generator[Event, None, Any]) -> Generator[Event, None, Any]:
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return end.value
            match event:
                case Stepped(step=step):
                    self.now += self.step_seconds(step)
                    self.step = step
                case Phase(name=name, state="end") if name in BESIDE:
                    self.now += BESIDE[name]
                case Saved(kind="adapter"):
                    self.now += SAVE
                case Phase(name="train", state="begin"):
                    self.began = self.now
            yield event

    def hears(self, event: Event) -> None:
        if isinstance(event, Forecast):
            low, middle, high = event.seconds_left
            self.ends[self.step] = self.now + low, self.now + middle, self.now + high


def ran(run: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Ticking, asked: Asked | None = None) -> Ran:
    def follow(self: Ahead, work: Generator[Event, None, Any]) -> Generator[Event, None, Any]:
        self.clock = lambda: clock.now
        inner = real(self, clock.passes(work))
        while True:
            try:
                event = next(inner)
            except StopIteration as end:
                return end.value
            clock.hears(event)
            yield event

    real = Ahead.follow
    monkeypatch.setattr(job.Ahead, "follow", follow)
    found = drive(run, folder, asked)
    assert found.error is None
    return found


def test_measurements_and_checkpoints_to_come_are_counted(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    ran(run_of(**SETTINGS), tmp_path / "run", monkeypatch, clock)
    # three measurements on the way, each the best so far and saved, and one at the end; the adapter may make them slower than the base's
    for step, off in ((5, 12.0), (20, 5.0), (35, 5.0)):
        assert clock.ends[step][1] == pytest.approx(clock.now, abs=off), step
        assert clock.ends[step][0] <= clock.now <= clock.ends[step][2]
    assert set(clock.ends) == set(range(STEPS + 1))


def test_before_the_first_step_it_rests_on_the_base_s_measurement(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ran(run_of(**SETTINGS), tmp_path / "run", monkeypatch, Ticking())
    first, *_ = found.of(Forecast)
    assert "first measurement" in first.basis
    assert found.events.index(first) < found.events.index(found.of(Stepped)[0])


def test_steps_of_an_earlier_run_of_this_kind_are_believed_first(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(**SETTINGS)
    ran(run, tmp_path / "first", monkeypatch, Ticking())
    kinds = measured.all_steps(CPU.name)
    (key,) = kinds
    assert all(point.parts == run.gradient_accumulation_steps for point in kinds[key])
    around = measured.around(CPU.name, forecast.around_key(from_folder(Path(run.model_name_or_path)), run))
    assert around is not None
    assert around.save_seconds == SAVE
    found = ran(run, tmp_path / "second", monkeypatch, Ticking())
    assert "steps measured on this machine" in found.of(Forecast)[0].basis


def test_a_pause_that_was_asked_for_is_no_time_of_training(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(wishes={12: [Wish("p", 0.0, 1, "pause", {})]})
    wait = lambda seconds: asked.wishes.setdefault(0, []).append(Wish("r", 0.0, 1, "resume", {}))  # noqa: E731
    monkeypatch.setattr(job, "Limits", partial(Limits, wait=wait))
    clock = Ticking()
    ran(run_of(**SETTINGS), tmp_path / "run", monkeypatch, clock, asked)
    assert clock.ends[12][1] + PAUSE == pytest.approx(clock.now, abs=8.0)
    assert clock.ends[20][1] == pytest.approx(clock.now, abs=5.0)


def test_a_slow_first_step_a_stall_and_a_change_of_speed(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(lambda step: 90.0 if step == 1 else 40.0 if step == 9 else 2.0 if step < 25 else 3.0)
    ran(run_of(**{**SETTINGS, "max_steps": 60}), tmp_path / "run", monkeypatch, clock)
    assert clock.ends[20][1] < clock.now  # nobody could know
    assert clock.ends[45][1] == pytest.approx(clock.now, rel=0.03)


def test_max_time_ends_it(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    found = ran(run_of(**{**SETTINGS, "max_time": 3600.0}), tmp_path / "run", monkeypatch, clock)
    assert found.of(Forecast)
    short = Ticking()
    monkeypatch.undo()
    ran(run_of(**{**SETTINGS, "max_time": 50.0}), tmp_path / "short", monkeypatch, short)
    assert short.ends[10][1] < clock.ends[10][1] - 25


def night(monkeypatch: pytest.MonkeyPatch, clock: Ticking, seconds: float) -> None:
    """Let `until` be so many seconds after the clock's beginning."""
    end = clock.now + seconds
    monkeypatch.setattr(job, "Deadline", lambda text: Deadline(text))
    monkeypatch.setattr(Deadline, "left", lambda self: end - clock.now)


def test_until_picks_as_many_steps_as_fit_and_their_rate_comes_to_its_end(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticking()
    night(monkeypatch, clock, 240.0)
    settings = {**SETTINGS, "max_steps": 400, "lr_scheduler_type": "linear", "warmup_steps": 0.0, "eval_steps": 1000, "save_steps": 1000}
    found = ran(run_of(**settings, until="07:00"), tmp_path / "run", monkeypatch, clock)
    steps = found.of(Stepped)
    assert found.result is not None
    assert found.result.reason == f"all {len(steps)} steps"
    # 240 s less 20 for saving, 3 for the trial, 11 for each of two measurements and 6 for what is saved: 2 s a step
    assert 80 <= len(steps) <= 95
    assert steps[-1].lr < 0.03 * steps[0].lr
    assert clock.now <= 1240.0
    assert {step.total_steps for step in steps[21:]} == {len(steps)}
    assert any("steps fit" in finding.message for finding in found.of(Finding))


def test_a_run_that_fits_keeps_all_its_steps(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    night(monkeypatch, clock, 5000.0)
    found = ran(run_of(**SETTINGS, until="07:00"), tmp_path / "run", monkeypatch, clock)
    assert len(found.of(Stepped)) == STEPS
    assert not [finding for finding in found.of(Finding) if finding.detector == "until"]


def test_a_resume_keeps_the_steps_that_were_picked(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    night(monkeypatch, clock, 200.0)
    run = run_of(**{**SETTINGS, "max_steps": 400, "eval_steps": 1000, "save_steps": 10}, until="07:00")
    first = ran(run, tmp_path / "run", monkeypatch, clock, Asked(at_step={25: "stop"}))
    picked = first.of(Stepped)[-1].total_steps
    assert picked < 400
    night(monkeypatch, clock, 100_000.0)
    monkeypatch.setattr(job, "read_records", lambda path: [])
    again = drive(run, tmp_path / "run", resume=True)
    assert again.error is None
    assert again.of(Stepped)[-1].step == picked


def test_a_run_that_takes_long_says_so_once_with_what_would_make_it_shorter(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "max_steps": 0, "num_train_epochs": 3.0, "eval_steps": 1000, "save_steps": 1000}
    found = ran(run_of(**settings), tmp_path / "run", monkeypatch, Ticking(lambda step: 7200.0))
    (told,) = [finding for finding in found.of(Finding) if finding.detector == "time"]
    assert "over 12 h" in told.message
    assert "over 6 h" in told.message
    ways = [one.split("=")[0] for one in told.advice]
    assert {"max_samples", "num_train_epochs"} <= set(ways)
    saved = told.numbers["saves_seconds"]
    assert all(0 < seconds < told.numbers["seconds"] for seconds in saved.values())
    monkeypatch.undo()
    short = ran(run_of(**SETTINGS), tmp_path / "short", monkeypatch, Ticking())
    assert not [finding for finding in short.of(Finding) if finding.detector == "time"]


def test_the_work_of_rows_that_lie_end_to_end_is_their_own_tokens_and_of_padded_ones_the_longest_as_often(
    run_of: Make, tmp_path: Path
) -> None:
    def load(packing: str, rounded: tuple[int, ...] = ()) -> Load:
        run = run_of(per_device_train_batch_size=2, packing=packing)
        model, stranger = from_folder(Path(run.model_name_or_path)), Machine("NVIDIA GB999", "cuda", 1 << 34, bf16=True)
        return Load(Choices(model, run, stranger, lengths, planner.choose(model, run, stranger)), rounded)

    lengths = [10, 40, 30, 20]  # batches of (40, 30) and (20, 10)
    assert load("off").of(lengths, 2, update=False) == 2 * 40 + 2 * 20
    assert load("on").of(lengths, 2, update=False) == 70 + 30
    assert load("off", (25, 50)).of(lengths, 2, update=False) == 2 * 50 + 2 * 25
    assert load("on", (32, 80)).of(lengths, 2, update=False) == 80 + 32
    assert load("off", (25, 50)).shapes(lengths, 2) == {(2, 50), (2, 25)}
    assert load("on", (32, 80)).shapes(lengths, 2) == {(2, 40.0), (2, 16.0)}
    assert load("on").shapes(lengths, 2) == set()
