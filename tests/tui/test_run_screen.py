"""The run screen over real journals: sizes, keys, wishes and ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from canned_run import ending, middle, opening, step
from textual import events

from qlora_tui.engine import events as ev
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.panels.base import Panel
from qlora_tui.tui.screens import run as run_module
from qlora_tui.tui.screens.dialogs import HelpDialog, StopDialog
from qlora_tui.tui.screens.run import SLOW_TICK, TICK, UNSEEN_TICK


def follow(folder: Path, **more) -> TunerApp:
    return TunerApp(start=None, draft=None, follow=folder, **more)


def words(app: TunerApp) -> str:
    """Return every cell on the screen as text."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def shown(app: TunerApp) -> set[str]:
    screen = app.run_screen
    assert screen is not None
    return {panel.id for panel in screen.query(Panel) if panel.display and panel.size.height > 0 and panel.region}


def wishes(folder: Path) -> list[str]:
    path = folder / "commands.jsonl"
    return [json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else []


async def test_80x24_shows_what_matters_at_once(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "left" in words(app) and "× " in words(app) and "4 warnings (1)" in words(app))
        text = words(app)
        assert "step 20/40" in text
        assert "● training" in text
        assert "tok/s" in text
        assert "9.6/24.0 GiB" in text
        assert "predicted 9.8" in text
        assert "98 % busy" in text
        assert "look at row 12" in text
        assert {"loss", "memory", "device", "findings", "log"} <= shown(app)
        assert max(len(line) for line in text.split("\n")) == 80


@pytest.mark.parametrize(
    ("size", "seen", "unseen"),
    [
        ((120, 36), {"status", "loss", "memory", "device", "findings", "log"}, {"summary", "scorecard"}),
        ((60, 20), {"status", "loss", "memory", "device"}, {"summary", "findings", "log"}),
        ((50, 20), {"status", "loss"}, {"summary", "memory", "findings", "log"}),
        ((39, 10), {"summary"}, {"status", "loss", "memory", "device", "findings", "log"}),
        ((1, 1), set(), {"loss"}),
    ],
)
async def test_every_size_shows_what_has_room(write_run, until, size, seen, unseen):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.run_screen.state.step == 20)
        await pilot.pause()
        assert seen <= shown(app)
        assert not unseen & shown(app)


async def test_a_small_terminal_gets_the_figures_as_text(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(39, 10)) as pilot:
        await until(pilot, lambda: "memory 9.6/24.0 GiB" in words(app))
        assert "step 20/40" in words(app)
        assert "1 warning" in words(app)


async def test_a_terminal_that_grows_gets_its_panels_back(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(39, 10)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.resize_terminal(100, 30)
        await until(pilot, lambda: "2 memory" in words(app) and "held-out ◆" in words(app))


async def test_before_the_first_step_the_phases_are_shown(write_run, until, run_config):
    folder, _, _ = write_run(opening(run_config)[:3])
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "50%" in words(app))
        assert "download" in words(app)
        assert "45 MiB of 90 MiB" in words(app)


async def test_new_events_appear(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        journal.write(step(21))
        await until(pilot, lambda: "step 21/40" in words(app))


async def test_enter_does_nothing_and_the_screen_stays(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("enter", "enter", "space", "tab")
        assert app.screen is app.run_screen
        assert wishes(folder) == []


@pytest.mark.parametrize("key", ["s", "q", "ctrl+q"])
async def test_leaving_a_run_of_this_process_asks_first_and_stop_is_the_default(write_run, until, key):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, StopDialog) and "stop and save" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: "stopping" in words(app))
        assert wishes(folder) == ["stop"]


async def test_the_dialog_can_detach_abort_or_be_left(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, StopDialog))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is app.run_screen)
        assert wishes(folder) == []
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, StopDialog))
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: wishes(folder) == ["abort"])
    assert app.left is None


async def test_a_run_that_ends_under_the_dialog_shows_how_it_ended(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, StopDialog))
        journal.write(ev.Finished("done", 0, "all steps done"))
        await until(pilot, lambda: app.screen is app.run_screen and "all steps done" in words(app))
    assert wishes(folder) == []


async def test_leaving_right_after_the_last_word_asks_nothing(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        journal.write(ev.Finished("done", 0, "all steps done"))
        app.run_screen.action_leave()
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "finished"


async def test_d_leaves_the_run_alone(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("d")
        await until(pilot, lambda: app.left is not None)
    assert (app.left.kind, app.left.folder) == ("detached", folder)
    assert wishes(folder) == []


async def test_ctrl_c_stops_at_once_and_the_second_aborts(write_run, until):
    folder, _, _ = write_run()
    aborted: list[bool] = []
    app = follow(folder, on_abort=lambda: aborted.append(True))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("ctrl+c")
        await until(pilot, lambda: "stopping" in words(app))
        assert wishes(folder) == ["stop"]
        assert aborted == []
        await pilot.press("ctrl+c")
        await until(pilot, lambda: aborted == [True])


async def test_after_ctrl_c_the_screen_closes_with_the_run(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder, on_abort=lambda: None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("ctrl+c")
        journal.write(ev.Finished("stopped", 130, "stopped by the user"))
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "finished"


async def test_ctrl_c_in_a_viewer_of_another_process_asks_and_leaving_is_the_default(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("ctrl+c")
        await until(pilot, lambda: isinstance(app.screen, StopDialog))
        await pilot.press("enter")
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "detached"
    assert wishes(folder) == []


async def test_a_readonly_viewer_leaves_no_wish(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder, readonly=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("s", "k")
        assert app.screen is app.run_screen
        await pilot.press("ctrl+c")
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "quit"
    assert wishes(folder) == []


async def test_a_stopped_run_says_of_which_step_its_measurement_is(write_run, until, run_config):
    """Stopped after step 45 and measured after step 40: the figure is not that of the adapter that was saved."""
    folder, _, lock = write_run([*opening(run_config), *middle(45), *ending()])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "measured at step 40 of 45" in words(app))


async def test_a_finished_run_shows_whether_it_helped(write_run, until, run_config):
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "base 3.20 → tuned 2.10" in words(app))
        text = words(app)
        assert "✔ done" in text
        assert "9 of 10 rows got better" in text
        assert "measured at step" not in text
        assert "a measurable improvement, mean row 1.10 nats lower (0.90 to 1.30)" in text
        assert "runs/test/adapter" in text
        assert "report.md and report.html beside it say how to use it" in text
        await pilot.press("enter")
        assert app.left is None
        await pilot.press("q")
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "finished"


async def test_a_finished_run_shows_what_got_worse_and_what_was_checked(write_run, until, run_config):
    saved, score, finished = ending()
    worst = tuple({"row": row, "base_loss": 1.0, "loss": 1.5, "prompt": f"what is {row}", "answer": "less"} for row in (7, 8))
    probes = [
        ev.Probed(40, name, "", 24, 900, 3.0, loss, 3.0 - loss, (-1.0, 2.0), 0.5) for name, loss in (("general", 3.3), ("train", 1.0))
    ]
    warned = ev.Finding("forgetting", "warn", 40, "general text is less likely", ("fewer epochs",))
    told = [saved, dataclasses.replace(score, worst=worst), *probes, warned, finished]
    folder, _, lock = write_run([*opening(run_config), *middle(40), *told])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "row 7 1.00 → 1.50" in words(app))
        text = words(app)
        assert "and 1 more in report.md" in text
        assert "general text 3.00 → 3.30 forgetting" in text
        assert "training rows 3.00 → 1.00" in text
        assert "overfitted" not in text


async def test_a_finished_run_says_where_only_manner_was_learned(write_run, until, run_config):
    saved, score, finished = ending()
    other = ev.Probed(40, "other_question", "", 24, 900, 5.0, 3.9, 1.1, (0.8, 1.4), 1.0, 0.03, (-0.09, 0.15))
    warned = ev.Finding("manner", "warn", 40, "perhaps only their manner was learned")
    again = dataclasses.replace(score, verdict="no clear improvement beyond manner: 1.10 and 1.07", manner=True)
    folder, _, lock = write_run([*opening(run_config), *middle(40), saved, score, other, warned, again, finished])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(120, 30)) as pilot:
        await until(pilot, lambda: "no clear improvement beyond manner, mean row" in words(app))
        assert "learned manner +1.10, content +0.03 nats manner alone?" in words(app)
        assert "a measurable improvement," not in words(app)


async def test_a_finished_run_is_drawn_once_and_looked_at_seldom(write_run, until, run_config, monkeypatch):
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "tuned 2.10" in words(app))
        await pilot.pause()
        drawn: list[str] = []
        for panel in app.run_screen.query(Panel):
            monkeypatch.setattr(panel, "draw", lambda *_, name=panel.id: drawn.append(name))
        for _ in range(3):
            app.run_screen.look()
        assert drawn == []
        assert app.run_screen._pace == SLOW_TICK


async def test_an_adapter_named_within_the_run_is_shown_with_its_folder(write_run, until, run_config):
    folder, _, _ = write_run([*opening(run_config), *middle(), ev.Finished("stopped", 130, "stopped and saved", adapter="adapter")])
    app = follow(folder)
    async with app.run_test(size=(160, 40)) as pilot:
        await until(pilot, lambda: f"{folder}/adapter" in words(app))
        assert "stopped: stopped" not in words(app)


async def test_a_run_that_died_without_a_word_is_called_crashed(write_run, until, run_config):
    folder, _, lock = write_run([])
    lock.release()
    told = [ev.Record(1, at + 1, 1000.0 + at, event) for at, event in enumerate([*opening(run_config), *middle()])]
    (folder / "events.jsonl").write_text("".join(ev.encode(record) + "\n" for record in told))
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.run_screen.state.step == 20)
        app.run_screen._opened = 0.0
        await until(pilot, lambda: "✖ crashed, silent for" in words(app) and "qlora-tui --resume 2026" in words(app))


async def test_number_keys_and_z_zoom(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        for key, only in (("2", "memory"), ("3", "device"), ("4", "findings"), ("5", "log"), ("1", "loss")):
            await pilot.press(key)
            await until(pilot, lambda only=only: shown(app) == {"status", only})
        await pilot.press("z")
        await until(pilot, lambda: {"loss", "memory", "log"} <= shown(app))
        await pilot.press("4")
        await until(pilot, lambda: "→ look at row 12" in words(app))
        await pilot.press("escape")
        await until(pilot, lambda: "loss" in shown(app))


async def test_find_goes_from_match_to_match_in_the_log(write_run, until):
    folder, _, _ = write_run([*[ev.Phase("load", "begin", note=f"part {number} of the whale") for number in range(60)], *middle()])
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.run_screen.state.step == 20)
        await pilot.press("slash", *"WHALE")
        await until(pilot, lambda: "60 of 60 with 'WHALE'" in words(app))
        assert "part 59 of the whale" in words(app)
        await pilot.press("enter")
        await pilot.press(*"nnn")
        await until(pilot, lambda: "57 of 60 with" in words(app) and "part 56 of the whale" in words(app))
        await pilot.press(*"N" * 4)
        await until(pilot, lambda: "1 of 60 with" in words(app) and "part 0 of the whale" in words(app))
        assert "part 59 of the whale" not in words(app)
        await pilot.press("escape")
        await until(pilot, lambda: "with 'WHALE'" not in words(app) and "checkpoint of step 20" in words(app))
        await pilot.press("slash", *"no such thing", "enter", "n")
        await until(pilot, lambda: "no lines with 'no such thing'" in words(app))


async def test_y_switches_the_loss_axis(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("y")
        await until(pilot, lambda: app.run_screen.view.log_y and "  log " in words(app))
        assert "cut off" not in words(app)


async def test_help_lists_the_keys(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog) and "show one panel alone" in words(app))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is app.run_screen)


async def test_ascii_mode_draws_nothing_else(write_run, until, run_config):
    folder, _, lock = write_run([*opening(run_config), *middle(40), *ending()])
    lock.release()
    app = follow(folder, ascii_only=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "tuned 2.10" in words(app))
        assert words(app).isascii()
        await pilot.resize_terminal(50, 18)
        await pilot.pause()
        assert words(app).isascii()


async def test_a_later_format_is_refused_in_a_sentence(write_run, until):
    folder, _, _ = write_run([])
    (folder / "events.jsonl").write_text('{"v":2,"attempt":1,"seq":1,"t":1.0,"type":"started"}\n')
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "quit"


async def test_only_changed_panels_are_sent(write_run, until):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.pause()
        panels = list(app.run_screen.query(Panel))
        before = {panel.id: panel.visual for panel in panels}
        app.run_screen.draw()
        assert {panel.id for panel in panels if panel.visual is not before[panel.id]} == set()


def rich(run_config, steps: int = 60) -> list[ev.Event]:
    """Return a run with everything the screen can show."""
    found = [*opening(run_config)]
    for number in range(1, steps + 1):
        loss = 50.0 if number == 40 else 3.0 - number * 0.02
        found.append(step(number, 100, loss, epoch=number / 100, lr=1e-4 if number > 30 else 2e-4))
        found.append(ev.Device(int(9.6 * 2**30), 2**29, 24 * 2**30, 98.0, 402.0, 450.0, 71.0, "power limit" if number == steps else ""))
    found += [ev.Evaluated(50, 2.2, 10, 0.1), ev.Saved(50, "checkpoints/50", 9), ev.MarkedHealthy(50)]
    found += [ev.Command("a", "set", True, "half"), ev.Phase("pause", "begin"), ev.Phase("pause", "end", seconds=1.0)]
    found += [ev.Sampled(number, f"question {number}", f"answer {number}\nin two lines") for number in (20, 40, 60)]
    found += [ev.Finding("spike", "warn", 40, "a spike", ("halve the rate",), {"loss": 50.0, "median": 2.2})]
    return [*found, ev.Forecast((1920.0, 2040.0, 2220.0), "the last steps")]


SIZES = [(60, 20), (80, 24), (120, 36), (200, 50)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["colour", "ascii", "no colour"])
async def test_every_size_and_mode_shows_every_panel_and_key(write_run, until, run_config, monkeypatch, size, mode):
    if mode == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder, ascii_only=mode == "ascii")
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "60/100" in words(app))
        for keys in ("x", "x", "w", "o", "left", "shift+left", "plus", "minus", "0", *"123456", "z", "y"):
            await pilot.press(keys)
            app.run_screen.draw()
            text = words(app)
            assert max(len(line) for line in text.split("\n")) == size[0]
            assert mode != "ascii" or text.isascii()
            assert "60/100" in text
            assert ("34 min (32-37)" in text) or ("33 min" in text)


@pytest.mark.parametrize("size", SIZES)
async def test_the_status_line_is_whole_at_every_size(write_run, until, run_config, size):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "(32-37)" in words(app))
        top = " ".join(words(app).split("\n")[:3])
        for told in ("training", "60/100", "0.6", "loss 2.", "2,400 tok/s", "left 34 min (32-37) ·"):
            assert told in top


async def test_the_crosshair_tells_the_figures_of_a_step_and_esc_leaves_it(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "step 60/100" in words(app))
        await pilot.press("left")
        await until(pilot, lambda: "1 loss  step 60  raw 1.800" in words(app))
        await pilot.press(*["left"] * 3)
        await until(pilot, lambda: "1 loss  step 57  raw 1.860" in words(app))
        title = words(app).split("\n")[2]
        for told in ("smooth 0.9 ", "lr 1e-4", "grad 0.80", "held-out 2.200 at 50"):
            assert told in title
        await pilot.press("w")
        await until(pilot, lambda: "smooth 0.99 " in words(app))
        await pilot.press("shift+left", "ctrl+left")
        await until(pilot, lambda: app.run_screen.view.sight.cross < 45)
        await pilot.press("escape")
        await until(pilot, lambda: "held-out ◆" in words(app))


async def test_plus_minus_and_0_look_closer_and_back(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "step 60/100" in words(app))
        await pilot.press("plus")
        await until(pilot, lambda: "30 steps, each" in words(app))
        await pilot.press("minus", "minus")
        await until(pilot, lambda: "steps, each" not in words(app))
        await pilot.press("plus", "0")
        await until(pilot, lambda: app.run_screen.view.sight.span == 0 and "steps, each" not in words(app))
        await pilot.press("plus", "escape")
        await until(pilot, lambda: app.run_screen.view.sight.span == 0)


async def test_an_outlier_is_cut_off_until_all_is_asked_for(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "cut off ▲" in words(app))
        await pilot.press("o")
        await until(pilot, lambda: "cut off" not in words(app) and "all values" in words(app))


async def test_marks_are_named_where_there_is_room(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(200, 50)) as pilot:
        await until(pilot, lambda: "saved ▴  warning !  rate set L  pause P" in words(app))
        assert "saved step 50, just now, healthy 50" in words(app)


async def test_samples_are_browsed(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "60/100" in words(app))
        assert "samples" not in shown(app)
        await pilot.press("6")
        await until(pilot, lambda: "6 samples  step 60  3 of 3" in words(app) and "in two lines" in words(app))
        await pilot.press("up")
        await until(pilot, lambda: "step 40  2 of 3" in words(app) and "answer 40" in words(app))
        await pilot.press("up", "up", "up")
        await until(pilot, lambda: "step 20  1 of 3" in words(app))
        await pilot.press("down")
        await until(pilot, lambda: "step 40  2 of 3" in words(app))
        await pilot.press("6")
        await pilot.resize_terminal(120, 36)
        await until(pilot, lambda: "samples" in shown(app))


async def test_a_sample_of_escapes_is_shown_as_words(write_run, until, run_config):
    folder, _, _ = write_run([*middle(3), ev.Sampled(3, "say \x1b[2J", "[bold]\x1b]0;title\x07[/bold]")])
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("6")
        await until(pilot, lambda: "[bold]\\x1b]0;title\\x07[/bold]" in words(app))
        assert "\x1b" not in words(app)


async def test_the_device_filling_the_screen_shows_the_past_of_each_figure(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "slowed down: power limit" in words(app))
        await pilot.press("3")
        await until(pilot, lambda: "past: 10 minutes" in words(app))
        for told in ("98 %", "402/450 W", "71 °C", "9.6/24.0 GiB", "1e-4", "0.80", "2,400 tok/s", "2.0 %", "0.50 s", "whole run"):
            assert told in words(app)


async def test_warnings_in_full_tell_what_they_rest_on(write_run, until, run_config):
    folder, _, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: "spike: loss 50.000, median 2.200" in words(app) and "→ halve the rate" in words(app))


async def test_hidden_panels_are_not_drawn(write_run, until, run_config, monkeypatch):
    folder, journal, _ = write_run(rich(run_config))
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "60/100" in words(app))
        await pilot.press("5")
        await until(pilot, lambda: shown(app) == {"status", "log"})
        drawn: list[str] = []
        for panel in app.run_screen.query(Panel):
            kept = panel.draw
            monkeypatch.setattr(panel, "draw", lambda *given, kept=kept, name=panel.id: (drawn.append(name), kept(*given))[1])
        journal.write(step(61, 100))
        await until(pilot, lambda: "61/100" in words(app))
        assert set(drawn) <= {"status", "log"}


async def test_a_terminal_out_of_focus_is_looked_at_seldom_and_brought_up_to_date_at_once(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        app.post_message(events.AppBlur())
        await until(pilot, lambda: app.run_screen._pace == UNSEEN_TICK)
        journal.write(step(21))
        app.post_message(events.AppFocus())
        await until(pilot, lambda: "step 21/40" in words(app) and app.run_screen._pace == TICK)


@pytest.mark.parametrize(("owned", "cost", "pace"), [(True, 0.001, TICK), (True, 0.004, 1.0), (True, 0.04, 2.0), (False, 0.04, TICK)])
async def test_the_screen_of_a_run_in_this_process_leaves_the_interpreter_to_it(write_run, until, monkeypatch, owned, cost, pace):
    folder, _, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        screen, spent = app.run_screen, itertools.count()
        screen.owned, screen._spent = owned, -cost
        monkeypatch.setattr(run_module.time, "thread_time", lambda: next(spent) * cost)
        for _ in range(5):
            screen.look()
        assert screen._pace == pace
        assert cost / screen._pace <= run_module.OWN_SHARE or pace in (run_module.OWN_TICKS[-1], TICK)
        screen.leave_when_finished()
        screen.look()
        assert screen._pace == TICK  # its last word is waited for


async def test_a_long_run_shows_its_end_before_it_was_read(write_run, until, monkeypatch):
    monkeypatch.setattr("qlora_tui.tui.follow.LONG", 10_000)
    told = [step(number, 3000, 3.0 - number / 2000) for number in range(1, 3001)]
    folder, _, _ = write_run(told)
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 3,000/3,000" in words(app))
        await until(pilot, lambda: not app.run_screen.behind)
        assert app.run_screen.state.history.buckets[0].first == 1
        await until(pilot, lambda: "reading" not in words(app).splitlines()[2])


async def test_only_the_cells_that_changed_are_sent(write_run, until):
    folder, journal, _ = write_run()
    app = follow(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "step 20/40" in words(app))
        await pilot.pause()
        sent = []
        status = app.run_screen.query_one("#status")
        kept = status.refresh
        status.refresh = lambda *regions, **more: (sent.append(regions), kept(*regions, **more))[1]
        journal.write(step(21))
        await until(pilot, lambda: "step 21/40" in words(app))
        cells = sum(region.width * region.height for regions in sent for region in regions)
        assert sent
        assert all(sent)
        assert cells < 78 * len(sent)  # of two lines of 78
