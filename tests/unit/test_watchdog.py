"""A silent run is told once, with its phase and how long; it is ended only where that was asked for."""

from __future__ import annotations

import logging
import threading

import pytest
from fake_run import step

from qlora_tui.engine.events import Device, Event, Finding, Phase, Saved
from qlora_tui.engine.watchdog import Watchdog


class Dog:
    """A watchdog on a clock that a test moves."""

    def __init__(self, end_after: float = 0.0) -> None:
        self.now, self.said, self.ended = 0.0, list[Event](), list[str]()
        main = threading.main_thread()
        self.dog = Watchdog(self.said.append, main, end_after=end_after, end=self.ended.append, clock=lambda: self.now)

    def hear(self, *events: Event) -> list[Finding]:
        return [finding for event in events for finding in self.dog.see(event)]

    def silent(self, seconds: float) -> list[str]:
        """Let time pass, looking every second, and return what was said."""
        before = len(self.said)
        for _ in range(int(seconds)):
            self.now += 1
            self.dog.look()
        return [finding.message for finding in self.said[before:] if isinstance(finding, Finding)]


def training(dog: Dog, seconds: float, steps: int = 5) -> None:
    dog.hear(Phase("train", "begin"))
    for number in range(1, steps + 1):
        dog.hear(step(number, 100, seconds=seconds))


def test_quick_steps_get_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    dog = Dog()
    training(dog, 0.5)
    assert dog.silent(60) == []
    with caplog.at_level(logging.WARNING):
        assert dog.silent(300) == ["no sign of life for 61 s in step 6; a step usually takes 0.5 s"]
    (finding,) = dog.said
    assert isinstance(finding, Finding)
    assert (finding.severity, finding.step, finding.numbers["patience_seconds"]) == ("warn", 5, 60.0)
    assert "test_quick_steps_get_a_minute" in caplog.text  # where the owner stands


def test_slow_steps_get_ten_times_their_own() -> None:
    dog = Dog()
    training(dog, 30.0)
    assert dog.silent(300) == []
    assert dog.silent(1) == ["no sign of life for 5 min in step 6; a step usually takes 30 s"]


@pytest.mark.parametrize(
    ("events", "where"),
    [
        ([], "the preparations"),
        ([Phase("load", "begin")], "loading"),
        ([Phase("load", "begin"), Phase("load", "end")], "the preparations"),
        ([Phase("train", "begin"), step(1, 100)], "step 2"),
        ([Phase("train", "begin"), *(step(n, 100) for n in range(1, 9)), Phase("eval", "begin")], "a measurement"),
        ([Phase("train", "begin"), Phase("save", "begin"), Phase("save", "end"), Phase("save", "begin")], "saving"),
    ],
)
def test_where_there_is_no_pace_five_minutes_pass_first(events: list[Event], where: str) -> None:
    dog = Dog()
    dog.hear(*events)
    assert dog.silent(300) == []
    assert [message.split(";")[0] for message in dog.silent(10)] == [f"no sign of life for 5 min in {where}"]


def test_a_measurement_over_is_a_step_again() -> None:
    dog = Dog()
    training(dog, 0.5)
    dog.hear(Phase("eval", "begin"), Phase("eval", "end"))
    assert len(dog.silent(61)) == 1


def test_a_pause_is_silent_on_purpose() -> None:
    dog = Dog(end_after=100)
    training(dog, 0.5)
    dog.hear(Phase("pause", "begin"))
    assert dog.silent(3600) == []
    assert dog.ended == []
    dog.hear(Phase("pause", "end"))
    assert len(dog.silent(61)) == 1


def test_any_word_of_the_owner_is_life_and_the_sampler_is_not() -> None:
    dog = Dog()
    training(dog, 0.5)
    for _ in range(10):
        dog.silent(59)
        assert dog.hear(Saved(5, "checkpoints/step-000005", 10)) == []
    dog.silent(59)
    dog.hear(Device())
    assert len(dog.silent(2)) == 1


def test_it_is_told_when_a_run_goes_on_and_a_second_silence_is_told_again() -> None:
    dog = Dog()
    training(dog, 0.5)
    dog.silent(95)
    (over,) = dog.hear(step(6, 100))
    assert (over.severity, over.message) == ("info", "the run goes on after 95 s without a sign of life")
    assert dog.hear(step(7, 100)) == []
    assert len(dog.silent(61)) == 1


def test_it_ends_a_run_only_where_that_was_asked_for() -> None:
    dog = Dog()
    training(dog, 0.5)
    dog.silent(100_000)
    assert dog.ended == []
    asked = Dog(end_after=1800)
    training(asked, 0.5)
    asked.silent(1800)
    assert asked.ended == []
    asked.silent(1)
    assert asked.ended == ["no sign of life for 30 min in step 6, and end_if_hung is 30 min"]


def test_a_process_that_stood_still_as_a_whole_is_not_blamed() -> None:
    dog = Dog(end_after=1800)
    training(dog, 0.5)
    dog.silent(30)
    dog.now += 100_000  # suspended; the watchdog's own thread slept too
    assert dog.silent(29) == []
    assert (len(dog.silent(3)), dog.ended) == (1, [])


def test_it_stops_though_it_was_never_started() -> None:
    Dog().dog.stop()
    dog = Dog().dog
    dog.start()
    dog.stop()
    dog.stop()
