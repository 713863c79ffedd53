"""What the screens look like anywhere: sizes, themes and their contrast, no colour, few colours, ASCII, chosen keys."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from canned_run import QuietDesk, ending, middle, opening, step
from rich.color import Color, ColorSystem
from textual.widgets import Footer, OptionList

from qlora_tui.engine import events as ev
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import plot, preferences, window
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.panels.cells import _THEMED
from qlora_tui.tui.preferences import Preferences
from qlora_tui.tui.screens import themes
from qlora_tui.tui.state import RunState, fold_all

SIZES = [(60, 20), (80, 24), (120, 36), (200, 50)]
RUN = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))


def follow(folder: Path, **more) -> TunerApp:
    return TunerApp(start=None, draft=None, follow=folder, **more)


def wizard(**more) -> TunerApp:
    return TunerApp(start=None, draft=RUN, follow=None, desk=QuietDesk(), **more)


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def whole(app: TunerApp) -> str:
    """Return every cell, those of the screens beneath a window too."""
    update = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    return "\n".join("".join(segment.text for strip in strips for segment in strip) for strips in update.strips)


def told(app: TunerApp) -> str:
    return " ".join(str(notice.message) for notice in app._notifications)


def colours(app: TunerApp) -> set[tuple[str, str]]:
    """Return the pairs of text and ground on the screen, where there is text."""
    found = set()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            if segment.text.strip() and style and style.color and style.bgcolor and style.color.triplet and style.bgcolor.triplet:
                found.add((style.color.triplet.hex, style.bgcolor.triplet.hex))
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    """Return the contrast ratio of WCAG 2.1."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_contrast_that_the_standard_says():
    assert round(contrast("#000000", "#ffffff"), 2) == 21.0
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", themes.THEMES, ids=lambda theme: theme.name)
def test_text_can_be_read_on_every_ground(theme):
    few = theme.name.endswith("-16")
    named = {"primary": theme.primary, "success": theme.success, "warning": theme.warning, "error": theme.error, "text": theme.foreground}
    named |= {name: theme.variables[name] for name in ("text-muted", "plot-axis", "footer-key-foreground", "footer-description-foreground")}
    named |= {name: colour for name, colour in theme.variables.items() if name.startswith("part-")}
    plain = {"background": theme.background, "surface": theme.surface}
    raised = {"panel": theme.panel, "chosen": theme.variables["chosen"]}
    bad = {f"{a} on {b}": round(contrast(named[a], plain[b]), 1) for a in named for b in plain if contrast(named[a], plain[b]) < 4.5}
    # sixteen colours leave two grounds to choose from, so what is chosen only has to be seen well
    least = 2.0 if few else 4.5
    bad |= {f"{a} on {b}": round(contrast(named[a], raised[b]), 1) for a in named for b in raised if contrast(named[a], raised[b]) < least}
    assert bad == {}


@pytest.mark.parametrize("theme", themes.THEMES, ids=lambda theme: theme.name)
def test_lines_and_marks_can_be_seen(theme):
    marks = [theme.variables[name] for name in ("frame-chosen", "plot-raw", "plot-line", "plot-eval", "plot-bad")]
    assert [mark for mark in marks if contrast(mark, theme.background) < 3] == []


def test_the_plot_takes_its_colours_from_the_theme():
    used = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in (plot.RAW, plot.SMOOTH, plot.EVAL, plot.BAD)} | {plot.AXIS}
    assert used <= set(_THEMED)
    for theme in themes.THEMES:
        assert {name.removeprefix("$") for name in _THEMED.values()} <= set(theme.variables)


@pytest.mark.parametrize("choice", ["dark", "light"])
async def test_every_text_on_the_screen_has_contrast(write_run, until, run_config, choice):
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    for app, sign in ((follow(folder, preferences=Preferences(choice)), "tuned 2.10"), (wizard(preferences=Preferences(choice)), "fits")):
        async with app.run_test(size=(120, 36)) as pilot:
            await until(pilot, lambda app=app, sign=sign: sign in words(app))
            frame = app.theme_variables["frame"]
            shown = {pair for pair in colours(app) if pair[0] != frame}
            assert len(shown) > 5
            assert {f"{text} on {ground}" for text, ground in shown if contrast(text, ground) < 2.7} == set()
            thin = {text for text, ground in shown if contrast(text, ground) < 4.5}
            assert thin <= {app.theme_variables["plot-raw"], app.theme_variables["scrollbar"]}


@pytest.mark.parametrize(
    ("choice", "environment", "few", "name"),
    [
        ("auto", {}, False, "qlora"),
        ("auto", {"COLORFGBG": "15;0"}, False, "qlora"),
        ("auto", {"COLORFGBG": "0;15"}, False, "qlora-light"),
        ("auto", {"COLORFGBG": "0;default;15"}, False, "qlora-light"),
        ("auto", {"COLORFGBG": "12;8"}, False, "qlora"),
        ("auto", {"COLORFGBG": "nonsense"}, False, "qlora"),
        ("light", {}, False, "qlora-light"),
        ("dark", {"COLORFGBG": "0;15"}, False, "qlora"),
        ("dark", {}, True, "qlora-16"),
        ("light", {}, True, "qlora-light-16"),
    ],
)
def test_the_theme_follows_the_choice_and_then_the_terminal(choice, environment, few, name):
    assert themes.chosen(choice, environment, few_colours=few) == name


async def test_the_other_theme_is_a_word_in_the_palette_and_stays(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        ground = app.screen.styles.background.hex.lower()
        await pilot.press("colon", *"theme", "enter")
        await until(pilot, lambda: app.theme == "qlora-light" and app.screen is app.run_screen)
        await until(pilot, lambda: app.screen.styles.background.hex.lower() != ground)
    assert preferences.read().theme == "light"


@pytest.mark.parametrize("system", [ColorSystem.STANDARD, ColorSystem.EIGHT_BIT])
@pytest.mark.parametrize("light", [False, True])
def test_text_can_be_read_where_colours_are_few(system, light):
    """What a terminal of 16 or 256 colours shows instead is still text on its ground."""
    standard = system is ColorSystem.STANDARD
    theme = {(True, False): themes.DARK_16, (True, True): themes.LIGHT_16, (False, False): themes.DARK, (False, True): themes.LIGHT}[
        standard, light
    ]

    def shown(colour: str | None) -> str:
        from rich.terminal_theme import TerminalTheme

        assert colour is not None
        vga = [(170 * (n & 1), 170 * (n >> 1 & 1), 170 * (n >> 2)) for n in range(8)]
        vga[3] = (170, 85, 0)
        bright = [(85 + 170 * (n & 1), 85 + 170 * (n >> 1 & 1), 85 + 170 * (n >> 2)) for n in range(8)]
        return Color.parse(colour).downgrade(system).get_truecolor(TerminalTheme((0, 0, 0), (255, 255, 255), vga, bright)).hex

    ground = shown(theme.background)
    texts = [theme.foreground, theme.primary, theme.success, theme.warning, theme.error, theme.variables["text-muted"]]
    assert [text for text in texts if contrast(shown(text), ground) < 4.5] == []
    assert shown(theme.variables["chosen"]) != ground, "what is chosen must be seen"


@pytest.mark.parametrize("size", SIZES)
async def test_both_screens_fill_every_size_and_cut_no_key(write_run, until, size):
    folder, _, _ = write_run()
    for app, sign in ((follow(folder), "step 20/40"), (wizard(), "fits")):
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda app=app, sign=sign: sign in words(app))
            lines = words(app).split("\n")
            assert (len(lines), {len(line) for line in lines}) == (size[1], {size[0]})
            await until(pilot, lambda app=app: len(app.screen.query_one(Footer).children) > 1)
            keys = "".join(f"{key.key_display} {key.description}  " for key in app.screen.query_one(Footer).children)
            assert "help" in keys
            assert len(keys) <= size[0] + 1


@pytest.mark.parametrize("size", [(39, 24), (80, 11), (39, 11), (20, 5), (10, 3), (1, 1)])
async def test_below_40x12_both_screens_are_a_few_words(write_run, until, size):
    folder, _, _ = write_run()
    for app, sign in ((follow(folder), "● training"), (wizard(), "1/5 goal")):
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda app=app, sign=sign: sign[: max(1, size[0] - 3)] in words(app) or size[0] < 4)
            assert size[0] < 4 or words(app).strip() != ""


async def test_a_wizard_made_small_and_large_again_loses_neither_page_nor_focus(until):
    app = wizard()
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "command line" in words(app))
        await pilot.press("down", "down")
        listed = app.screen.query_one("#offers", OptionList)
        await until(pilot, lambda: listed.highlighted == 2)
        for size in ((10, 3), (39, 11), (200, 50), (1, 1), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
        await pilot.press("up")
        await until(pilot, lambda: listed.highlighted == 1 and "memory" in words(app))


async def test_no_size_breaks_a_window_over_the_screen(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        for key in ("s", "question_mark", "colon"):
            await pilot.press(key)
            for size in ((10, 3), (1, 1), (60, 20), (200, 50), (80, 24)):
                await pilot.resize_terminal(*size)
                await pilot.pause()
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is app.run_screen)
    assert app.failure == ""


STATES: list[tuple[str, list[ev.Event], str]] = [
    ("training", middle(), "training"),
    ("done", [*middle(40), *ending()], "done"),
    ("failed", [*middle(), ev.Finished("failed", 1, "out of luck")], "failed"),
    ("diverged", [*middle(), ev.Finished("diverged", 4, "the loss ran away")], "diverged"),
    ("stopped", [*middle(), ev.Finished("stopped", 130, "stopped by the user")], "stopped"),
    ("aborted", [*middle(), ev.Finished("aborted", 130, "aborted")], "aborted"),
    ("does not fit", [ev.Finished("will_not_fit", 3, "too big")], "does not fit"),
    ("loading", [ev.Phase("load", "begin")], "load"),
]


@pytest.mark.parametrize(("events", "said"), [state[1:] for state in STATES], ids=[state[0] for state in STATES])
async def test_without_colour_every_state_is_still_a_word(write_run, until, run_config, monkeypatch, events, said):
    monkeypatch.setenv("NO_COLOR", "1")
    folder, _, _ = write_run([*opening(run_config)[:-1], *events])
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: said in words(app).split("\n")[0])
        assert re.search(r"[●◌✔■✖] [a-z]", words(app).split("\n")[0]), "a glyph stands before the word"


async def test_no_two_states_differ_by_colour_alone(write_run, until, run_config):
    seen = set()
    for name, events, _ in STATES:
        folder, _, _ = write_run([*opening(run_config)[:-1], *events], name=f"20261125-164012-{name.replace(' ', '-')}")
        app = follow(folder)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda app=app: app.run_screen is not None and app.run_screen.state.seq > 5)
            await pilot.pause()
            seen.add(words(app).split("\n")[0].split("2048")[-1].strip())
    assert len(seen) == len(STATES)


@pytest.mark.parametrize("no_color", [False, True])
async def test_the_chosen_line_is_seen_without_colour(until, monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    app = wizard()
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "command line" in words(app))
        listed = app.screen.query_one("#offers", OptionList)
        assert bool(listed.get_component_rich_style("option-list--option-highlighted").underline) == no_color


async def test_the_chosen_panel_is_seen_without_colour(write_run, until, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "┏━ 1 loss" in words(app) and "╭─ 2 memory" in words(app))


def test_the_title_tells_how_far_it_is_and_holds_nothing_foreign():
    state = fold_all(ev.Record(1, seq, 1000.0 + seq, event) for seq, event in enumerate([*opening(RUN), *middle()], 1))
    assert re.fullmatch(r"qlora 50% loss \d\.\d\d left 2 min", window.run_title(state, state.t))
    assert window.run_title(state, state.t, lost=True).startswith("qlora crashed loss")
    assert window.run_title(RunState(), 0.0) == "qlora starting"
    nasty = ev.Finished("x\x1b]52;c;eA==\x07\u202e\x9b", 1, "y")  # type: ignore[arg-type]  # a journal may hold anything
    told = window.title(window.run_title(dataclasses.replace(state, finished=nasty), 0.0))
    assert told.startswith("\x1b]2;qlora x]52;c;eA==")
    assert told.count("\x1b") == told.count("\x07") == 1
    assert told.isascii()


def test_a_console_without_a_title_is_sent_none():
    assert [term for term in ("linux", "dumb", "vt100", "") if window.has_title({"TERM": term})] == []
    assert all(window.has_title({"TERM": term}) for term in ("xterm-256color", "screen", "tmux-256color", "foot"))


@pytest.mark.parametrize(
    ("environment", "told"),
    [({}, False), ({"SSH_CONNECTION": "a"}, True), *(({"SSH_CONNECTION": "a", name: "b"}, False) for name in ("TMUX", "STY"))],
)
def test_the_hint_is_for_those_whose_line_may_break(environment, told):
    assert bool(window.ssh_hint(environment)) == told


async def test_a_copy_is_in_a_file_of_the_run_and_nobody_says_copied(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("5", "c")
        await until(pilot, lambda: "last-copy.txt" in told(app))
        assert "copied" not in told(app)
    kept = (folder / "last-copy.txt").read_text()
    assert "checkpoint of step 20" in kept
    assert app._clipboard + "\n" == kept


async def test_a_readonly_viewer_copies_into_its_own_folder(write_run, until, home):
    folder, _, _ = write_run()
    app = follow(folder, readonly=True)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("c")
        await until(pilot, lambda: "last-copy.txt" in told(app))
    assert (home / "state" / "last-copy.txt").exists()
    assert not (folder / "last-copy.txt").exists()


async def test_the_bell_rings_once_for_nan_and_once_at_the_end(write_run, until, run_config, monkeypatch):
    rung: list[int] = []
    folder, journal, _ = write_run([*opening(run_config), step(1), step(2)])
    app = follow(folder)
    monkeypatch.setattr(app, "bell", lambda: rung.append(app.run_screen.state.step))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.run_screen._seen_running and app.run_screen.state.step == 2)
        for number in (3, 4):
            journal.write(step(number, loss=float("nan")))
            await until(pilot, lambda number=number: app.run_screen.state.step == number)
        assert rung == [3]
        journal.write(ev.Finished("failed", 1, "x"))
        await until(pilot, lambda: app.run_screen.state.finished is not None)
        await until(pilot, lambda: rung == [3, 4])


async def test_a_run_that_ended_long_ago_rings_no_bell(write_run, until, run_config, monkeypatch):
    rung: list[bool] = []
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    app = follow(folder)
    monkeypatch.setattr(app, "bell", lambda: rung.append(True))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "tuned 2.10" in words(app))
    assert rung == []


def prefer(home: Path, text: str) -> Path:
    path = home / "config" / "screen.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


async def test_keys_may_be_chosen_and_all_that_names_them_follows(write_run, until, home):
    prefer(home, '[keys]\nzoom = "v"\nlog-scale = "?"\nhelp = "F6, F9"\n')
    folder, _, _ = write_run()
    app = follow(folder, preferences=preferences.read())
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "v zoom" in words(app) and "step 20/40" in words(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: app.run_screen.view.log_y)
        await pilot.press("z")
        assert app.run_screen.view.zoomed == ""
        await pilot.press("v")
        await until(pilot, lambda: app.run_screen.view.zoomed == "loss")
        await pilot.press("f9")
        await until(pilot, lambda: re.search(r"v  make one panel fill", words(app)) is not None and "f6 f9  show the keys" in words(app))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[keys]\nsotp = "x"', "did you mean stop?"),
        ('[keys]\nstop = "z"', "key 'z' would be both stop and zoom"),
        ('[keys]\nstop = "ctrl+c"', "key 'ctrl+c' would be both interrupt and stop"),
        ('[keys]\ninterrupt = "x"', "no action 'interrupt' whose key can be changed"),
        ('[keys]\nstop = "hyper+x"', "stop = 'hyper+x' names no key"),
        ("[keys]\nstop = 3", "stop = '3' names no key"),
        ('[keys]\nstop = ""', "names no key"),
        ('[keys]\nprobe = "3"', "numbers are typed in the wizard"),
        ('keys = "x"', "keys is no table"),
        ('theme = "sepia"', "no theme 'sepia'; there are auto, dark, light"),
        ('thme = "dark"', "no setting 'thme' of the screens"),
        ("theme = ", "cannot be read"),
    ],
)
def test_a_fault_in_the_file_is_told_in_one_sentence(home, text, said):
    path = prefer(home, text)
    with pytest.raises(ConfigError) as caught:
        preferences.read()
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_said_now_wins_over_the_file_and_the_file_over_the_last_time(home):
    assert preferences.read().theme == "auto"
    preferences.remember_theme("light")
    assert preferences.read().theme == "light"
    prefer(home, 'theme = "dark"')
    assert preferences.read().theme == "dark"
    assert preferences.read("auto").theme == "auto"
    (home / "state" / "theme.txt").write_text("rubbish")
    prefer(home, "")
    assert preferences.read().theme == "auto"


async def test_no_window_draws_more_than_ascii_either(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, ascii_only=True, on_abort=lambda: None)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        for key, sign in (("question_mark", "esc closes"), ("colon", "leave running"), ("s", "back"), ("c", "clipboard")):
            await pilot.press(key)
            await until(pilot, lambda sign=sign: sign in whole(app))
            assert {char for char in whole(app) if not char.isascii()} == set()
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is app.run_screen)
