"""Side by side: blind, two keys, kept at once, taken back, and usable while the answers are still being made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from qlora_tui.engine.errors import Stopped, WontFit
from qlora_tui.engine.journal import RunLock
from qlora_tui.engine.judge import JUDGEMENTS, ME, Answered, Judgement, Sheet, begin_answers, keep_answer, keep_judgement, read_pairs, tally
from qlora_tui.engine.judge.kept import Call
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.pairlines import pair_lines, summary_lines
from qlora_tui.tui.screens.sidebyside import SideBySideScreen

SIZES = [(80, 24), (120, 36), (60, 20), (40, 12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three pairs."""
    home = tmp_path / "runs" / "20261125-164012-test"
    home.mkdir(parents=True)
    (home / "run.toml").write_text("")
    begin_answers(home, Sheet("a", 3, 64, 3, "qlora nf4 bfloat16"))
    for row in range(3):
        keep_answer(home, pair(row))
    return home


def pair(row: int, **more) -> Answered:
    fields = {"prompt": f"What is {row}?", "wanted": f"the wanted {row}", "base": f"base says {row}", "tuned": f"tuned says {row}"}
    return Answered(row, **(fields | more))


def nothing_to_make(folder, rows, tokens, say, stopping) -> None:
    say(3, 3)


def app_of(folder: Path, *, make=nothing_to_make, **more) -> TunerApp:
    def screen(ascii_only: bool) -> SideBySideScreen:
        return SideBySideScreen(folder, 3, 64, ascii_only=ascii_only, make=make)

    return TunerApp(start=None, draft=None, follow=None, screen=screen, **more)


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def side_of(app: TunerApp, word: str) -> str:
    """Return where an answer stands: before or behind the line between the two."""
    line = next(line for line in words(app).splitlines() if f"{word} says" in line)
    return "left" if line.index(f"{word} says") < line.index("│") else "right"


@pytest.mark.parametrize("size", SIZES)
async def test_a_pair_is_shown_blind_on_any_terminal(folder, until, size):
    app = app_of(folder)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app) and "q leave" in words(app))
        shown = words(app)
        assert "base says 0" in shown
        assert "tuned says 0" in shown
        assert ("│" in shown) == (size[0] > 64)
        assert "tuned:" not in shown.replace("tuned says", "")
        assert "wanted" not in shown


async def test_two_keys_judge_and_what_is_judged_is_kept_at_once(folder, until):
    app = app_of(folder)
    async with app.run_test(size=(100, 24)) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app))
        await pilot.press(side_of(app, "tuned"))
        await until(pilot, lambda: "What is 1?" in words(app))
        assert tally(read_pairs(folder), ME).wins == 1
        assert "tuned wins 100 % (21-100)" in words(app)
        await pilot.press(side_of(app, "base"))
        await until(pilot, lambda: "What is 2?" in words(app))
        assert tally(read_pairs(folder), ME).losses == 1
        await pilot.press("t")
        await until(pilot, lambda: "no clear preference" in words(app))
    found = tally(read_pairs(folder), ME)
    assert (found.wins, found.losses, found.ties, found.rate) == (1, 1, 1, 0.5)


async def test_a_session_goes_on_where_the_last_one_ended(folder, until):
    keep_judgement(folder, Judgement(pair(0).pair, 0, ME, "base"))
    app = app_of(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What is 1?" in words(app))
        assert "pair 2 of 3" in words(app)
        first = side_of(app, "tuned")
        await pilot.press("p")
        await until(pilot, lambda: "you said:" in words(app))
        await pilot.press("n")
        await until(pilot, lambda: "What is 1?" in words(app))
        assert side_of(app, "tuned") == first


async def test_undo_takes_the_last_judgement_back(folder, until):
    app = app_of(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app))
        await pilot.press("u")  # nothing to take back
        await pilot.press("left", "s")
        await until(pilot, lambda: "What is 2?" in words(app))
        await pilot.press("u")
        await until(pilot, lambda: "What is 1?" in words(app))
        assert tally(read_pairs(folder), ME).skipped == 0
        await pilot.press("backspace")
        await until(pilot, lambda: "What is 0?" in words(app))
        assert tally(read_pairs(folder), ME).judged == 0
        assert "you said" not in words(app)
    assert len((folder / JUDGEMENTS).read_text().splitlines()) == 4, "nothing is rewritten"


async def test_what_was_revealed_is_not_judged_blind(folder, until):
    app = app_of(folder)
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app))
        await pilot.press("r")
        await until(pilot, lambda: "the wanted 0" in words(app))
        assert f"{side_of(app, 'tuned')}: tuned" in words(app)
        await pilot.press("left", "t")
        assert "What is 0?" in words(app)
        found = tally(read_pairs(folder), ME)
        assert (found.judged, found.skipped) == (0, 1)
        assert "n next" in words(app)
        await pilot.press("u")
        assert tally(read_pairs(folder), ME).skipped == 1, "it cannot be taken back either"
        await pilot.press("n", "left", "p")
        await until(pilot, lambda: "you said: left" in words(app))
        await pilot.press("r")
        await until(pilot, lambda: "the wanted 1" in words(app))
        assert tally(read_pairs(folder), ME).judged == 1, "to look after judging changes nothing"


async def test_it_begins_with_the_first_answer_and_the_rest_follow(folder, until):
    go_on, ended = threading.Event(), threading.Event()
    (folder / "answers.jsonl").unlink()

    def make(folder, rows, tokens, say, stopping):
        say(0, 0)
        assert go_on.wait(20)
        begin_answers(folder, Sheet("a", 3, 64, 3))
        keep_answer(folder, pair(0))
        say(1, 3)
        while not stopping():
            threading.Event().wait(0.01)
        ended.set()
        raise Stopped("stopped")

    app = app_of(folder, make=make)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "loading the model" in words(app))
        assert "Which answer would you rather have?" in words(app)
        go_on.set()
        await until(pilot, lambda: "What is 0?" in words(app))
        assert "1 of 3 answered" in words(app)
        await pilot.press("left")
        await until(pilot, lambda: "100 %" in words(app) or " 0 %" in words(app))
        await pilot.press("q")
    assert ended.wait(20), "leaving ends the other process"
    assert app.left is not None


@pytest.mark.parametrize(
    ("error", "told"), [(WontFit("it does not fit \x1b[31m"), "does not fit \\x1b"), (ValueError("odd"), "ValueError: odd")]
)
async def test_what_keeps_answers_from_being_made_is_told_and_the_rest_can_be_judged(folder, until, error, told):
    def make(*_):
        raise error

    app = app_of(folder, make=make)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: told in words(app))
        await pilot.press("left")
        await until(pilot, lambda: "What is 1?" in words(app))
        assert told in words(app)


async def test_a_run_that_trains_is_not_loaded_a_second_time(folder, until):
    lock = RunLock(folder)
    app = app_of(folder, make=lambda *_: pytest.fail("made"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "is running" in words(app))
    lock.release()


async def test_a_full_disk_is_told_and_nothing_is_lost(folder, until):
    (folder / JUDGEMENTS).mkdir()
    app = app_of(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app))
        await pilot.press("left")
        await until(pilot, lambda: "cannot be written" in words(app))
        assert "What is 0?" in words(app)


async def test_equal_answers_are_passed_over(folder, until):
    keep_answer(folder, pair(0, base="alike", tuned="alike"))  # the newer line of a row counts
    app = app_of(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What is 1?" in words(app))
        assert "1 done" in words(app)
        await pilot.press("p")
        await until(pilot, lambda: "both answered the same" in words(app))
        await pilot.press("left")
        assert not (folder / JUDGEMENTS).exists()


async def test_long_texts_scroll_and_a_long_prompt_opens(folder, until):
    keep_answer(
        folder, pair(0, prompt="\n".join(f"prompt line {n}" for n in range(40)), tuned="\n".join(f"tuned says {n}" for n in range(60)))
    )
    app = app_of(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "prompt line 0" in words(app))
        assert "more lines (o)" in words(app)
        assert "tuned says 0" in words(app), "a long prompt leaves room for the answers"
        await pilot.press(*["pagedown"] * 8)
        await until(pilot, lambda: "tuned says 59" in words(app))
        await pilot.press("o")
        await until(pilot, lambda: "more lines" not in words(app))


async def test_help_lists_the_keys_and_ascii_has_no_other_letters(folder, until):
    app = app_of(folder, ascii_only=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What is 0?" in words(app))
        assert words(app).isascii()
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog) and "the left answer is better" in words(app))


@pytest.mark.parametrize("width", [20, 40, 63, 64, 80, 200])
def test_no_line_is_wider_than_the_screen(width):
    wide = pair(1, base="漢字" * 100, tuned="word " * 100, prompt="x" * 500, cut=(True, True))
    for tuned_first in (True, False):
        lines = pair_lines(wide, tuned_first, width, prompt_lines=4, said="tuned", opened=True)
        assert max(line.cell_length for line in lines) <= width


def test_the_summary_names_every_judge_and_the_interval(folder):
    assert "nothing is judged" in summary_lines(read_pairs(folder), 80)[0].plain
    keep_judgement(folder, Judgement(pair(0).pair, 0, ME, "tuned"))
    for first in ("base", "tuned"):
        keep_judgement(folder, Judgement(pair(0).pair, 0, "gpt at host", "base", Call(first, "base")))
    shown = "\n".join(line.plain for line in summary_lines(read_pairs(folder), 80))
    assert "you, blind  100 % (95 % interval 21-100)" in shown
    assert "gpt at host  0 % (95 % interval 0-79)" in shown
