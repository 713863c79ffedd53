"""The fold: what the run screen knows, from events alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.engine import events as ev
from qlora_tui.tui.history import LIMIT, History
from qlora_tui.tui.state import LOG_LINES, RunState, fold, fold_all


def step(number: int, loss: float = 2.0, total: int = 100) -> ev.Stepped:
    return ev.Stepped(number, total, 0.1, loss, 1.0, False, not math.isfinite(loss), 1e-4, 100, 50, 0.5, 0.05)


def records(*events: ev.Event, first: int = 1) -> list[ev.Record]:
    return [ev.Record(1, first + index, 1000.0 + index, event) for index, event in enumerate(events)]


def test_steps_move_the_run_on():
    state = fold_all(records(step(1), step(2, 1.5)))
    assert (state.step, state.total_steps, state.seq) == (2, 100, 2)
    assert state.speed == pytest.approx(200)
    assert state.data_share == pytest.approx(0.1)


def test_a_record_that_was_seen_changes_nothing():
    state = fold_all(records(step(1), step(2)))
    assert fold(state, records(step(1))[0]) is state


def test_fold_leaves_the_old_state_as_it_was():
    before = fold_all(records(step(1, 3.0)))
    after = fold(before, ev.Record(1, 2, 1001.0, step(2, 1.0)))
    assert before.step == 1
    assert len(before.history.buckets) == 1
    assert after.step == 2


def test_smoothing_starts_at_the_first_loss_and_skips_what_is_not_finite():
    history = History().add(1, 4.0)
    assert history.smooth == pytest.approx(4.0)
    assert history.add(2, math.nan).smooth == pytest.approx(4.0)
    assert history.add(2, math.inf).bad == 1
    assert history.add(2, 2.0).smooth == pytest.approx((0.9 * 0.1 * 4 + 0.1 * 2) / 0.19)


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(math.nan), st.just(math.inf), st.just(-math.inf)), max_size=60))
def test_history_never_lets_non_finite_losses_into_its_range(losses: list[float]):
    history = History()
    for number, loss in enumerate(losses, 1):
        history = history.add(number, loss)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert sum(bucket.steps for bucket in history.buckets) == len(losses)
    assert history.bad == sum(bucket.bad for bucket in history.buckets) == len(losses) - len(finite)
    assert min((bucket.low for bucket in history.buckets), default=math.inf) == min(finite, default=math.inf)
    assert max((bucket.high for bucket in history.buckets), default=-math.inf) == max(finite, default=-math.inf)
    assert (history.smooth is None) == (not finite)
    if finite:
        assert min(finite) - 1e-6 <= history.smooth <= max(finite) * (1 + 1e-9) + 1e-6


def test_history_is_bounded_and_keeps_spikes():
    history = History()
    for number in range(1, 20_001):
        history = history.add(number, 50.0 if number == 12_345 else 1.0)
    assert len(history.buckets) <= LIMIT
    assert max(bucket.high for bucket in history.buckets) == 50.0
    assert history.buckets[0].first == 1
    assert history.buckets[-1].last == 20_000


@given(st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=30)
def test_a_resume_from_a_checkpoint_goes_back_to_exactly_its_history(saved: int, more: int):
    straight = fold_all(records(*[step(n, 5.0 - n / 10) for n in range(1, saved + 1)]))
    told: list[ev.Event] = [step(n, 5.0 - n / 10) for n in range(1, saved + 1)]
    told.append(ev.Saved(saved, "checkpoints/x", 10))
    told += [step(saved + n, 99.0) for n in range(1, more + 1)]
    told.append(ev.Evaluated(saved + more + 1, 9.0, 10, 0.1))
    told.append(ev.Finding("late", "warn", saved + more + 1, "void"))
    told.append(ev.Resumed(saved))
    state = fold_all(records(*told))
    assert state.history == straight.history
    assert state.step == saved
    assert state.evals == ()
    assert state.findings == ()


def test_a_resume_without_a_known_checkpoint_cuts_at_the_bucket():
    state = fold_all(records(*[step(n) for n in range(1, 31)], ev.Resumed(12)))
    assert state.history.buckets[-1].last == 12
    assert state.step == 12
    assert fold(state, ev.Record(2, 99, 2000.0, step(13, 1.0))).history.buckets[-1].last == 13


def test_a_new_attempt_takes_the_last_word_back():
    done = fold_all(records(step(1), ev.Finished("stopped", 130, "stopped by the user")))
    assert done.finished is not None
    again = fold(done, ev.Record(2, 9, 2000.0, ev.Started("run", {}, {}, {}, resumed_from=1)))
    assert again.finished is None
    assert "goes on after step 1" in again.log[-1].text


def test_phases_tell_what_is_done_and_what_took_how_long():
    begin, on = ev.Phase("fetch", "begin", 0, 100, "bytes"), ev.Phase("fetch", "progress", 40, 100, "bytes")
    state = fold_all(records(begin, on))
    assert state.doing is not None
    assert (state.doing.name, state.doing.done, state.doing.total, state.doing.since) == ("fetch", 40, 100, 1000.0)
    ended = fold(state, ev.Record(1, 3, 1009.0, ev.Phase("fetch", "end", seconds=9.0)))
    assert ended.doing is None
    assert ended.phases == (("download", 9.0),)


def test_the_scorecard_is_the_evaluation_that_compares():
    base, score = ev.Evaluated(0, 4.0, 10, 0.1), ev.Evaluated(5, 2.0, 10, 0.1, base_loss=4.0, drop=2.0, verdict="good")
    state = fold_all(records(base, score))
    assert state.base_loss == 4.0
    assert state.scorecard == score
    assert state.evals == ((0, 4.0), (5, 2.0))


def test_memory_keeps_its_peak_and_what_was_predicted():
    planned = ev.Planned({"total_bytes": 900, "device": {"total_bytes": 1000}}, {"optim": "adamw_torch"})
    state = fold_all(records(planned, ev.Device(700, 10, 1000), ev.Device(500, 10, 1000)))
    assert (state.predicted_bytes, state.machine_bytes, state.peak_bytes) == (900, 1000, 700)


def test_histories_of_every_kind_are_bounded():
    told: list[ev.Event] = []
    for number in range(1, 1200):
        told += [ev.Finding("x", "warn", number, "again"), ev.Device(utilization=50.0), ev.Saved(number, "p", 1)]
    state = fold_all(records(*told))
    assert len(state.log) <= LOG_LINES
    assert len(state.findings) <= 200
    assert len(state.readings) <= 600
    assert len(state.marks) <= 32


def test_foreign_text_is_safe_before_it_is_kept():
    nasty = "a\x1b]52;c;AAAA\x07b\u202ec\nd"
    state = fold_all(records(ev.Finding("x", "warn", 1, nasty), ev.Phase("load", "begin", note=nasty), ev.Finished("failed", 1, nasty)))
    assert all(line.text.isprintable() for line in state.log)
    assert state.doing is None


@given(st.lists(st.sampled_from(sorted(ev.EVENT_TYPES)), max_size=20))
def test_any_order_of_events_folds(kinds: list[str]):
    examples: dict[str, ev.Event] = {
        "started": ev.Started("r", {}, {}, {}),
        "phase": ev.Phase("load", "end"),
        "prepared": ev.Prepared("f", "w", 1, 1, 0, 1, 1, 1, 1),
        "planned": ev.Planned({}),
        "stepped": step(3),
        "evaluated": ev.Evaluated(3, math.nan, 1, 0.0),
        "saved": ev.Saved(3, "p", 1),
        "marked_healthy": ev.MarkedHealthy(2),
        "resumed": ev.Resumed(1),
        "rolled_back": ev.RolledBack(1, 0.5, 1),
        "device": ev.Device(),
        "forecast": ev.Forecast((1.0, 2.0, 3.0), "b"),
        "finding": ev.Finding("d", "info", 3, "m"),
        "command": ev.Command("i", "stop", True),
        "finished": ev.Finished("done", 0, "r"),
    }
    state = fold_all(records(*[examples[kind] for kind in kinds if kind in examples]))
    assert isinstance(state, RunState)


def test_what_happened_to_the_run_is_marked_at_its_step():
    told: list[ev.Event] = [step(1), step(2), ev.Saved(2, "checkpoints/2", 9), step(3), ev.Command("a", "set", True, "half")]
    told += [ev.Command("b", "set", False, "too late"), ev.Command("c", "save", True), ev.Phase("pause", "begin"), ev.Phase("pause", "end")]
    state = fold_all(records(*told))
    assert state.moments == ((2, "saved"), (3, "rate"), (3, "pause"))
    assert [line.text for line in state.log if "pause" in line.text] == ["pause", "pause: done in 1.0 s"]
    back = fold_all(records(ev.RolledBack(2, 0.5, 1, "diverged"), first=50), state)
    assert back.moments == ((2, "saved"), (2, "back"))
    again = fold_all(records(step(3), ev.Resumed(2), first=60), back)
    assert again.moments == ((2, "saved"), (2, "back"), (2, "resume"))


def test_the_last_healthy_checkpoint_and_the_last_one_are_known():
    state = fold_all(records(step(1), ev.Saved(1, "checkpoints/1", 9), step(2), ev.MarkedHealthy(1), ev.Saved(2, "x", 9, "adapter")))
    assert (state.healthy, state.saved.step, state.saved_at) == (1, 1, 1001.0)


def test_samples_are_kept_as_they_are_and_bounded():
    state = fold_all(records(*[ev.Sampled(n, "say \x1b[2J", "x" * 9000) for n in range(200)]))
    assert len(state.samples) == 50
    assert state.samples[-1].step == 199
    assert len(state.samples[-1].text) <= 4000
    assert all(line.text.isprintable() for line in state.log)


def test_readings_keep_ten_minutes_and_leave_out_what_no_sensor_says():
    told = [ev.Device(100, 0, 1000, math.nan if n % 2 else 50.0, None, None, 60.0) for n in range(1500)]
    state = fold_all(records(*told))
    assert len(state.readings) == 600
    assert {reading.busy for reading in state.readings} == {None, 50.0}
    assert {reading.watts for reading in state.readings} == {None}
    assert state.readings[-1].t == 1000.0 + 1499


def test_a_long_row_of_measurements_keeps_its_beginning():
    state = fold_all(records(*[ev.Evaluated(n, 3.0, 10, 0.1) for n in range(2000)]))
    assert len(state.evals) <= 500
    assert state.evals[0][0] == 0
    assert state.evals[-1][0] == 1999


def test_the_time_between_two_attempts_does_not_count():
    first = [ev.Started("r", {}, {}, {}), step(1), step(2)]
    state = fold_all(records(*first))
    later = [ev.Record(2, 10, 90_000.0, ev.Started("r", {}, {}, {}, resumed_from=2)), ev.Record(2, 11, 90_005.0, step(3))]
    state = fold_all(later, state)
    assert [bucket.seconds for bucket in state.history.buckets] == [1.0, 2.0, 7.0]


@given(st.lists(st.sampled_from(["step", "device", "eval", "saved", "back", "finding", "sampled", "phase"]), max_size=40))
def test_many_records_at_once_fold_as_one_by_one(kinds: list[str]):
    examples: dict[str, ev.Event] = {
        "step": step(3, 2.5),
        "device": ev.Device(5, 6, 7, 8.0),
        "eval": ev.Evaluated(3, 2.0, 1, 0.0),
        "saved": ev.Saved(3, "p", 1),
        "back": ev.RolledBack(1, 0.5, 1),
        "finding": ev.Finding("d", "warn", 3, "m"),
        "sampled": ev.Sampled(3, "a", "b"),
        "phase": ev.Phase("pause", "begin"),
    }
    told = records(*[examples[kind] for kind in kinds])
    before = RunState(run_id="r")
    single = before
    for record in told:
        single = fold(single, record)
    assert fold_all(told, before) == single
    assert before == RunState(run_id="r")
