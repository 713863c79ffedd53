"""Heat and time: training pauses and goes on by itself, ends in time, and never without one step and a word."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from loop_driver import Asked, drive
from safetensors.torch import load_file

from qlora_tui.engine.events import Event, Finding, Phase, Saved, Stepped
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import job, limits
from qlora_tui.engine.train.limits import Limits
from qlora_tui.engine.until import Deadline

Make = Callable[..., RunConfig]


def readings(monkeypatch: pytest.MonkeyPatch, *degrees: float | None) -> list[float]:
    """Let the sensor say these one after another, then the last for ever; return the seconds that were waited."""
    waited: list[float] = []
    told = itertools.chain(degrees, itertools.repeat(degrees[-1]))
    monkeypatch.setattr(job, "Limits", partial(Limits, temperature=lambda: next(told), wait=waited.append))
    return waited


def pauses(events: list[Event]) -> list[str]:
    return [event.state for event in events if isinstance(event, Phase) and event.name == "pause"]


def test_a_hot_device_pauses_training_until_it_is_cooler(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = drive(run_of(), tmp_path / "quiet")
    waited = readings(monkeypatch, 70, 84, 82, 78, 75, 70)
    ran = drive(run_of(max_temperature=80), tmp_path / "hot")
    assert ran.error is None
    assert pauses(ran.events) == ["begin", "end"]
    assert waited == [1.0] * 3  # until 75: at 78 it would be hot again with the next step
    hot, cool = [finding for finding in ran.of(Finding) if finding.detector == "temperature"]
    assert (hot.severity, hot.step) == ("warn", 1)
    assert "the device has 84 °C and max_temperature is 80; training goes on at 75" in hot.message
    assert cool.message.startswith("the device has 75 °C: the pause ends")
    one, two = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in (quiet, ran))
    assert all((one[name] == two[name]).all() for name in one)


def test_a_device_at_its_limit_is_not_too_hot(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings(monkeypatch, 80)
    ran = drive(run_of(max_temperature=80), tmp_path / "run")
    assert pauses(ran.events) == []


@pytest.mark.parametrize("limit", [0, 80])
def test_without_a_limit_or_a_sensor_nothing_waits(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    readings(monkeypatch, *((95,) if not limit else (None,)))
    ran = drive(run_of(max_temperature=limit), tmp_path / "run")
    assert pauses(ran.events) == []
    assert len(ran.of(Stepped)) == 6


def test_a_sensor_that_falls_silent_does_not_hold_the_run(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings(monkeypatch, 90, 90, None)
    ran = drive(run_of(max_temperature=80), tmp_path / "run")
    assert len(ran.of(Stepped)) == 6
    assert any("the sensor no longer answers" in finding.message for finding in ran.of(Finding))


def test_a_stop_and_a_save_are_obeyed_in_a_pause(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device gets hot after the third step and never cools down."""
    asked = Asked()
    waited = readings(monkeypatch, 70, 70, 70, 90)

    def urgent() -> str | None:
        if len(waited) == 2:
            asked.at_step = {0: "save"}
        return "stop" if len(waited) > 4 else None

    monkeypatch.setattr(asked, "urgent", urgent)
    ran = drive(run_of(max_temperature=80, save_steps=100, eval_steps=100), tmp_path / "run", asked)
    assert ran.result is not None
    assert ran.result.outcome == "stopped"
    assert len(ran.of(Stepped)) == 3
    assert [event.step for event in ran.of(Saved) if event.kind == "checkpoint"] == [3]
    order = [event.type if not isinstance(event, Phase) else f"{event.name} {event.state}" for event in ran.events]
    assert order.index("pause begin") < order.index("saved") < order.index("pause end")


@pytest.mark.parametrize(("left", "steps"), [(1000.0, 6), (20.5, 1), (-5.0, 1)])
def test_the_run_ends_in_time_for_a_step_a_measurement_and_saving(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float, steps: int
) -> None:
    monkeypatch.setattr(Deadline, "left", lambda _: left)
    monkeypatch.setattr(limits, "SAVING_SECONDS", 21.0 if left == 20.5 else 0.0)
    ran = drive(run_of(until="07:00"), tmp_path / "run")
    assert ran.result is not None
    assert ran.result.outcome == "done"
    assert len(ran.of(Stepped)) == steps
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert ("time was up" in ran.result.reason) is (steps < 6)


def test_a_clock_that_is_set_under_a_run_is_told_and_the_run_goes_on(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 22:00 a run is to be done by 07:00; after its second step somebody sets the clock to 08:00 of the next day."""
    ten = time.mktime((2026, 11, 26, 22, 0, 0, 0, 0, -1))
    wall = [ten]
    monkeypatch.setattr(job, "Deadline", lambda text: Deadline(text, lambda: wall[0], lambda: 0.0))

    def jump(step: Stepped) -> None:
        wall[0] = ten + (36_000 if step.step >= 2 else 0)

    ran = drive(run_of(until="07:00"), tmp_path / "run", on_step=jump)
    assert ran.error is None
    assert len(ran.of(Stepped)) == 6
    told = [finding.message for finding in ran.of(Finding) if finding.detector == "clock"]
    assert told == ["the clock was set forward by 10 h: until 07:00 there is 23 h now"]


def test_what_is_left_has_to_hold_the_slowest_recent_step_and_the_measurement() -> None:
    deadline = Deadline("")
    deadline.left = lambda: 100.0  # type: ignore[method-assign]
    one = Limits(RunConfig(until="07:00"), deadline)
    assert not one.up(10.0, [(1, 1, 3.0)] * 9, 70.0)
    assert one.up(10.0, [(1, 1, 3.0)] * 9, 78.0)
    assert one.up(10.0, [(1, 1, 3.0), (1, 1, 50.0)], 40.0)
    assert not one.up(10.0, [(1, 1, 50.0), *[(1, 1, 3.0)] * 8], 40.0)
    assert not one.up(0.0, [], 1e9)
