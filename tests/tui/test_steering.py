"""Keys that steer a run, and viewers beside it: what a key leaves, what the status says, and what is told when a run refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from canned_run import middle, opening, step
from textual.pilot import Pilot

from qlora_tui.engine import events as ev
from qlora_tui.engine.journal import COMMANDS
from qlora_tui.engine.text import one_line
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.panels.base import View
from qlora_tui.tui.panels.status import figures, state_words
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.state import RunState, fold


def follow(folder: Path, **more: Any) -> TunerApp:
    return TunerApp(start=None, draft=None, follow=folder, **more)


def words(app: TunerApp) -> str:
    """Return every cell on the screen as text."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wishes(folder: Path) -> list[dict[str, Any]]:
    path = folder / COMMANDS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def notices(app: TunerApp) -> list[str]:
    return [notice.message for notice in app._notifications]


def told(*events: ev.Event, at: float = 1000.0) -> RunState:
    """Fold events that come a second apart, the first at `at`."""
    state = RunState()
    for number, event in enumerate(events):
        state = fold(state, ev.Record(1, number + 1, at + number, event))
    return state


def state_at(state: RunState, now: float, **view: Any) -> str:
    return state_words(state, View(now=now, **view))[0]


PAUSE = ev.Command("1", "pause", obeyed=True)
BEGIN = ev.Phase("pause", "begin", note="as asked")


# what each key leaves


@pytest.mark.parametrize(
    ("key", "name", "args", "notice"),
    [
        ("p", "pause", {}, "pauses after this step: saves, and frees the device; p goes on"),
        ("a", "sample", {}, "after this step the model shows what it answers now"),
        ("l", "set", {"key": "learning_rate", "factor": 0.5}, "half the learning rate from the next step on; L takes it back"),
        ("L", "set", {"key": "learning_rate", "factor": 2.0}, "double the learning rate from the next step on; l takes it back"),
        ("k", "save", {}, "a checkpoint will be saved at the next safe point"),
    ],
)
async def test_a_key_leaves_its_wish_and_says_what_comes(write_run, until, key, name, args, notice):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press(key)
        await until(pilot, lambda: notices(app) == [notice])
        ((left),) = wishes(folder)
        assert (left["name"], left["args"], left["attempt"]) == (name, args, 1)


async def test_the_same_key_pauses_and_goes_on(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("p")
        await until(pilot, lambda: wishes(folder) != [])
        journal.write(ev.Command(wishes(folder)[0]["id"], "pause", obeyed=True))
        journal.write(BEGIN)
        journal.write(ev.Phase("save", "begin"))
        journal.write(ev.Phase("save", "end", seconds=0.1))
        await until(pilot, lambda: "paused " in words(app) and "p goes on" in words(app))
        assert "left " not in words(app).split("\n")[1]
        await pilot.press("p")
        await until(pilot, lambda: [one["name"] for one in wishes(folder)] == ["pause", "resume"])
        journal.write(ev.Command(wishes(folder)[1]["id"], "resume", obeyed=True))
        journal.write(ev.Phase("pause", "end", seconds=3.0))
        journal.write(step(21))
        await until(pilot, lambda: "● training" in words(app))


@pytest.mark.parametrize("more", [{"readonly": True}, {}])
async def test_keys_are_offered_where_they_do_something_only(write_run, until, more):
    folder, journal, _ = write_run()
    if not more:
        journal.write(ev.Finished("done", 0, "all done"))
    app = follow(folder, **more)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "20/40" in words(app))
        for key in ("p", "a", "l", "L", "k"):
            await pilot.press(key)
        assert wishes(folder) == []
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog))
        assert "learning rate" not in words(app)
        assert "pause: save" not in words(app)


async def test_help_names_them_while_the_run_goes(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "20/40" in words(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: "half the learning rate (l), or double it (L)" in words(app))
        assert "pause: save and free the device" in words(app)
        assert "show what the model answers now" in words(app)


# answers


async def test_a_refusal_comes_back_to_who_asked_with_its_reason(write_run, until):
    folder, journal, _ = write_run()
    one, other = follow(folder), follow(folder)
    async with one.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(one))
        for key in ("l", "a", "k"):
            await pilot.press(key)
        await until(pilot, lambda: len(wishes(folder)) == 3)
        rate, sample, save = (wish["id"] for wish in wishes(folder))
        journal.write(ev.Command(rate, "set", obeyed=False, why="it would be 0.005 times \x1b]0;x\x07 the planned one"))
        journal.write(ev.Command(sample, "sample", obeyed=False, why="no rows are held out [/]"))
        journal.write(ev.Command(save, "save", obeyed=True))
        journal.write(ev.Command("of somebody else", "pause", obeyed=False, why="it is paused already"))
        journal.write(step(21))
        wanted = ["learning rate: it would be 0.005 times \\x1b]0;x\\x07 the planned one", "sample: no rows are held out [/]"]
        await until(pilot, lambda: notices(one)[3:] == wanted)
    async with other.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 21/40" in words(other))
        assert notices(other) == []


async def test_two_viewers_steer_one_run_and_each_wish_has_an_id_of_its_own(write_run, until):
    folder, journal, _ = write_run()
    one, two = follow(folder), follow(folder)

    async def press(app: TunerApp, pilot: Pilot[None], *keys: str) -> None:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press(*keys)

    async with one.run_test(size=(80, 24)) as first, two.run_test(size=(120, 36)) as second:
        await press(one, first, "l", "k")
        await press(two, second, "L", "k", "a")
        await until(first, lambda: len(wishes(folder)) == 5)
        ids = [wish["id"] for wish in wishes(folder)]
        assert len(set(ids)) == 5
        for wish in wishes(folder):
            journal.write(ev.Command(wish["id"], wish["name"], obeyed=wish["name"] != "set", why="for a test"))
        await until(first, lambda: notices(one)[2:] == ["learning rate: for a test"])
        await until(second, lambda: notices(two)[3:] == ["learning rate: for a test"])


# the status


def test_a_pause_is_told_with_how_long_it_lasts_and_how_it_ends(run_config) -> None:
    asked = told(*opening(run_config), step(3), PAUSE)
    assert state_at(asked, asked.t) == "◌ pausing"
    paused = told(*opening(run_config), step(3), PAUSE, BEGIN)
    assert state_at(paused, paused.t + 130) == "◌ paused 2 min 10 s · p goes on"
    assert state_at(paused, paused.t + 130, readonly=True) == "◌ paused 2 min 10 s"
    going = told(*opening(run_config), step(3), PAUSE, BEGIN, ev.Command("2", "resume", obeyed=True))
    assert state_at(going, going.t) == "◌ paused 1 s, goes on by itself"
    ended = told(*opening(run_config), step(3), PAUSE, BEGIN, ev.Phase("pause", "end", seconds=3.0), step(4))
    assert state_at(ended, ended.t) == "● training"
    hot = told(*opening(run_config), step(3), ev.Phase("pause", "begin", note="the device has 84 °C"))
    assert state_at(hot, hot.t + 20) == "◌ paused 20 s, goes on by itself"


def test_the_time_left_stands_still_in_a_pause(run_config) -> None:
    forecast = ev.Forecast((50.0, 60.0, 70.0), "the last steps")
    state = told(*opening(run_config), step(3), forecast)
    paused = fold(state, ev.Record(1, 900, state.t, BEGIN))
    ended = fold(paused, ev.Record(1, 901, state.t + 3600.0, ev.Phase("pause", "end", seconds=3600.0)))

    def figure(state: RunState, now: float) -> str:
        return "".join(part for group in figures(state, View(now=now)) for part, _ in group)

    assert "left 60 s (50-70)" in figure(state, state.t)
    assert "left" not in figure(paused, state.t + 1800.0)
    assert "left 60 s (50-70)" in figure(ended, ended.t)


def test_a_pause_that_a_crash_ended_is_none_in_the_next_attempt(run_config) -> None:
    again = told(*opening(run_config), step(3), PAUSE, BEGIN, *opening(run_config), step(3))
    assert state_at(again, again.t) == "● training"


def test_silence_is_told_with_its_length(run_config) -> None:
    state = told(*opening(run_config), *middle())
    assert state_at(state, state.t + 14) == "● training"
    assert state_at(state, state.t + 130) == "◌ no word for 2 min 10 s"
    assert state_at(state, state.t + 130, lost=True).startswith("✖ crashed")


async def test_a_run_of_another_process_that_stands_still_says_for_how_long(write_run, until, monkeypatch):
    folder, _, _ = write_run()
    late = time.time() + 135
    monkeypatch.setattr("qlora_tui.tui.screens.run.time.time", lambda: late)
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "no word for 2 min 1" in words(app))


def test_a_sample_is_told_and_its_text_is_made_safe(run_config) -> None:
    state = told(*opening(run_config), ev.Sampled(3, "say \x1b[2J", "abc\n[/] \x9b1m\u202edef"))
    line = state.log[-1].text
    assert line == one_line(line)
    assert line == "sample after step 3: say \\x1b[2J → abc [/] \\x9b1m\\u202edef"


def test_many_answers_are_bounded(run_config) -> None:
    state = told(*(ev.Command(str(number), "save", obeyed=True) for number in range(100)))
    assert [answer.id for answer in state.answers] == [str(number) for number in range(84, 100)]
