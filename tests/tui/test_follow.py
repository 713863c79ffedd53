"""Following a journal: its end first, the rest behind it, and in the end the state of a plain fold."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine import events as ev
from qlora_tui.engine.journal import Journal, read_records
from qlora_tui.tui.follow import Follower
from qlora_tui.tui.history import LIMIT
from qlora_tui.tui.state import fold_all


def step(number: int, loss: float = 2.0) -> ev.Stepped:
    return ev.Stepped(number, 100_000, 0.1, loss, 1.0, False, not math.isfinite(loss), 1e-4, 100, 50, 0.5, 0.05)


def written(path: Path, events: list[ev.Event], *, after: int = 0, attempt: int = 1) -> None:
    with path.open("a") as file:
        for at, event in enumerate(events, after + 1):
            file.write(ev.encode(ev.Record(attempt, at, 1000.0 + at, event)) + "\n")


def told(kinds: list[str]) -> list[ev.Event]:
    """Return a run of these events, its steps numbered and its ways back leading to steps that were done."""
    found: list[ev.Event] = [ev.Started("a run", {"lora_r": 16}, {}, {"name": "a card"})]
    at = 0
    for index, kind in enumerate(kinds):
        at = {"step": at + 1, "nan": at + 1, "back": at // 2, "resume": max(0, at - 2)}.get(kind, at)
        loss = math.nan if kind == "nan" else 4.0 - (index % 17) / 10
        found.append(
            {
                "step": step(at, loss),
                "nan": step(at, loss),
                "device": ev.Device(100 + index, 0, 1000, 50.0),
                "eval": ev.Evaluated(at, 3.0, 10, 0.1),
                "save": ev.Saved(at, f"checkpoints/{at}", 10),
                "back": ev.RolledBack(at, 0.5, 1, "it diverged"),
                "resume": ev.Resumed(at),
                "find": ev.Finding("spike", "warn", at, "a spike"),
                "sample": ev.Sampled(at, "say", "said"),
            }[kind]
        )
    return found


KINDS = st.lists(
    st.sampled_from(["step", "step", "step", "nan", "device", "eval", "save", "back", "resume", "find", "sample"]), max_size=60
)


@given(KINDS, KINDS, st.integers(1, 4000), st.integers(1, 900), st.integers(0, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_filled_in_late_equals_a_plain_fold(tmp_path_factory, first, later, near, block, before):
    path = tmp_path_factory.mktemp("run") / "events.jsonl"
    written(path, told(first))
    follower = Follower(path, long=0, end=near, block=block)
    for _ in range(before):
        follower.look(0.0)
    written(path, told(later), after=len(first) + 1, attempt=2)
    follower.look(0.0)
    while follower.behind:
        follower.look(0.0)
    assert follower.state == fold_all(read_records(path))
    assert follower.share == 1.0


def test_the_end_is_known_before_the_rest(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [ev.Started("a run", {"lora_r": 16}, {}, {}), ev.Planned({"total_bytes": 900}), *[step(n) for n in range(1, 4001)]]
    written(path, [*events, ev.Saved(4000, "checkpoints/x", 10), ev.Finished("done", 0, "all steps")])
    follower = Follower(path, long=10_000, end=20_000, block=1000)
    follower.look(0.0)
    assert follower.behind
    assert 0 < follower.share < 0.1
    state = follower.state
    assert (state.step, state.run_id, state.predicted_bytes, state.config) == (4000, "a run", 900, {"lora_r": 16})
    assert state.saved is not None
    assert state.finished is not None
    numbers = [bucket.first for bucket in state.history.buckets]
    assert numbers[0] == 1
    assert numbers == sorted(numbers)
    assert max(b - a for a, b in itertools.pairwise(numbers)) > 1000  # what lies between is to come
    while follower.behind:
        follower.look(0.0)
    assert follower.state.history.buckets[-1].last == 4000


def test_a_short_file_is_folded_from_its_start(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, told(["step"] * 20))
    follower = Follower(path)
    follower.look(5.0)
    assert not follower.behind
    assert follower.state == fold_all(read_records(path))


def test_a_file_that_is_not_there_yet_is_waited_for(tmp_path):
    follower = Follower(tmp_path / "events.jsonl", "early")
    follower.look()
    assert (follower.state.run_id, follower.behind) == ("early", False)
    written(tmp_path / "events.jsonl", told(["step"]))
    follower.look()
    assert follower.state.step == 1


def test_a_torn_line_that_the_next_attempt_cuts_off_costs_nothing(tmp_path):
    journal = Journal(tmp_path)
    journal.write(step(1))
    journal.close()
    path = tmp_path / "events.jsonl"
    with path.open("a") as file:
        file.write('{"v":1,"attempt":1,"seq":2,"t":5.0,"type":"stepp')
    follower = Follower(path)
    follower.look()
    again = Journal(tmp_path)
    again.write(ev.Started("a run", {}, {}, {}, resumed_from=1))
    again.write(step(2))
    again.close()
    follower.look()
    assert (follower.state.run_id, follower.state.step, follower.state.attempt) == ("a run", 2, 2)


@pytest.fixture
def long_run(tmp_path) -> Path:
    """Return a journal of three times as many steps as the history holds one by one, with a void stretch in the middle."""
    path, events = tmp_path / "events.jsonl", list[ev.Event]()
    for number in range(1, 3 * LIMIT):
        events.append(step(number, 2.0 + (number % 7) / 10))
        if number == 3000:
            events += [step(other, 99.0) for other in range(3001, 3051)]
            events.append(ev.Resumed(3000))
    written(path, events)
    return path


def test_a_closer_look_has_every_step_of_the_file_and_no_void_one(long_run):
    follower = Follower(long_run, block=2000)
    follower.look(60.0)
    assert follower.state.history.stride > 1
    close = follower.close_look(2980, 3020)
    shown = {bucket.last: bucket for bucket in close if 2980 <= bucket.last <= 3020}
    assert sorted(shown) == list(range(2980, 3021))
    assert all(bucket.low == bucket.high == pytest.approx(2.0 + (number % 7) / 10) for number, bucket in shown.items())
    coarse = {bucket.last: bucket for bucket in follower.state.history.buckets}
    both = sorted(shown.keys() & coarse.keys())
    assert both
    for number in both:
        assert shown[number].smooth == pytest.approx(coarse[number].smooth)
        assert shown[number].tokens == coarse[number].tokens


def test_a_closer_look_at_the_end_grows_with_the_run(long_run):
    follower = Follower(long_run, block=2000)
    follower.look(60.0)
    last = follower.state.step
    first_look = follower.close_look(last - 40, last)
    assert first_look[-1].last == last
    written(long_run, [step(last + 1, 7.0)], after=10_000)
    follower.look()
    close = follower.close_look(last - 39, last + 1)
    assert (close[-1].last, close[-1].high) == (last + 1, 7.0)
    assert close[-2].last == last


@pytest.mark.parametrize(("left", "right"), [(0, 30), (1, 30), (500, 900), (6000, 6143), (6100, 9000)])
def test_the_same_closer_look_is_read_once(long_run, monkeypatch, left, right):
    follower = Follower(long_run, block=2000)
    follower.look(60.0)
    read: list[int] = []
    kept = follower._read_again
    monkeypatch.setattr(follower, "_read_again", lambda *ends: (read.append(1), kept(*ends))[1])
    for number in range(5):
        follower.look()
        assert follower.close_look(left, right)
        written(long_run, [step(3 * LIMIT + number)], after=20_000 + number)
    assert len(read) == 1


def test_a_closer_look_at_too_much_is_what_the_history_has(long_run, monkeypatch):
    monkeypatch.setattr("qlora_tui.tui.follow._CLOSE", 1000)
    follower = Follower(long_run, block=2000)
    follower.look(60.0)
    assert follower.close_look(1, 5000) == follower.state.history.buckets


def test_a_short_history_is_as_fine_as_it_gets(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, told(["step"] * 50))
    follower = Follower(path)
    follower.look()
    assert follower.close_look(10, 20) == follower.state.history.buckets
