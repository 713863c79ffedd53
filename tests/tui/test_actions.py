"""One table of keys: footer, help and palette say the same, and nothing is bound outside it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from canned_run import QuietDesk, ending, middle, opening
from textual.widgets import Footer, Input, OptionList

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import actions
from qlora_tui.tui.actions import PLACES, Action, clash, help_lines, written
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.screens.dialogs import HelpDialog, StopDialog
from qlora_tui.tui.screens.keys import KeyedScreen
from qlora_tui.tui.screens.palette import PaletteDialog

ROOM = Path(actions.__file__).resolve().parent


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def follow(folder: Path, **more) -> TunerApp:
    return TunerApp(start=None, draft=None, follow=folder, **more)


def listed(app: TunerApp) -> list[str]:
    found = app.screen.query_one("#found", OptionList)
    return [str(found.get_option_at_index(index).prompt) for index in range(found.option_count)]


def footer(app: TunerApp) -> str:
    return "".join(f"{key.key_display} {key.description}  " for key in app.screen.query_one(Footer).children)


def test_nothing_is_bound_outside_the_table():
    nodes = [(path.name, node) for path in ROOM.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    found = {name for name, node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Binding"}
    assert found == {"keys.py"}


def test_every_action_has_somebody_who_does_it():
    """An action of the table that no screen has a method for would be a key that does nothing."""
    methods = {
        node.name
        for path in ROOM.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    given = {"dismiss", "focus_previous", "focus_next", "nothing"}  # Textual's own; and what only stands in the help
    called = {action.call.split("(")[0].rsplit(".", 1)[-1] for place in PLACES.values() for action in place}
    assert {name for name in called - given if f"action_{name}" not in methods} == set()


def test_no_key_means_two_things_where_both_are_heard():
    assert clash({}) is None
    assert clash({"save": "z"}) == ("z", "save", "zoom")
    assert clash({"save": "z", "zoom": "k"}) is None
    assert clash({"score": "z"}) is None, "the triage and the run screen are never heard together"


def test_names_are_unique_within_a_place():
    for place, table in PLACES.items():
        assert len({action.name for action in table}) == len(table), place


def test_keys_are_written_as_they_are_pressed():
    assert written(Action("x", "ctrl+o,question_mark,z", "x"), {}) == "^o ?"
    assert written(Action("x", "left", "x", written="←"), {}) == "←"
    assert written(Action("x", "left", "x", written="←"), {"x": "b"}) == "b"
    assert help_lines([Action("a", "q", "quit", "leave"), Action("b", "q", "quit", "leave"), Action("c", "z")], {}) == [("q", "leave")]


@pytest.mark.parametrize("key", ["colon", "ctrl+p"])
async def test_the_palette_finds_by_words_and_does_what_was_found(write_run, until, key):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, PaletteDialog) and len(listed(app)) > 6)
        await pilot.press(*"check save")
        await until(pilot, lambda: len(listed(app)) == 1)
        assert "save a checkpoint at the next safe point" in listed(app)[0]
        await pilot.press("enter")
        await until(pilot, lambda: (folder / "commands.jsonl").exists())
        assert json.loads((folder / "commands.jsonl").read_text())["name"] == "save"
        assert app.screen is app.run_screen


async def test_the_palette_opens_other_windows_and_can_be_left(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("colon")
        await until(pilot, lambda: isinstance(app.screen, PaletteDialog))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is app.run_screen)
        await pilot.press("colon", "down", "up", "enter")
        await until(pilot, lambda: isinstance(app.screen, StopDialog))
        await pilot.press("escape", "colon", *"zzzz", "enter")
        await until(pilot, lambda: isinstance(app.screen, PaletteDialog) and listed(app) == [])


async def test_what_cannot_be_done_is_offered_nowhere(write_run, until, run_config):
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "tuned 2.10" in words(app))
        assert "stop" not in footer(app)
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog))
        assert "stop: choose how" not in words(app)
        await pilot.press("escape", "colon")
        await until(pilot, lambda: isinstance(app.screen, PaletteDialog) and len(listed(app)) > 2)
        assert not [line for line in listed(app) if line.startswith(("stop", "save", "leave running"))]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
async def test_the_footer_cuts_nothing_in_half_and_keeps_help_and_quit(write_run, until, width):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(width, 24)) as pilot:
        await until(pilot, lambda: "? help  q quit" in footer(app))
        assert len(footer(app)) <= width + 1
        await pilot.resize_terminal(120, 24)
        await until(pilot, lambda: "log scale" in footer(app))


async def test_on_a_page_to_type_on_the_palette_opens_by_ctrl_p_and_leaves_letters_out(until, tmp_path):
    app = TunerApp(start=None, draft=RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("a.jsonl",)), follow=None, desk=QuietDesk())
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "command line" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.focused, Input))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.focused, Input) and app.focused.id == "data-name")
        await pilot.press("colon")
        await until(pilot, lambda: app.focused.value.endswith(":"))
        await pilot.press("ctrl+p")
        await until(pilot, lambda: isinstance(app.screen, PaletteDialog) and any("F3" in line for line in listed(app)))
        assert [line for line in listed(app) if line.startswith("quit")], "where one types, q is a letter, and quitting has a name"
        await pilot.press(*"limit nothing has this", "escape")
        screen = app.screen
        assert isinstance(screen, KeyedScreen)
