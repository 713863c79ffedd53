"""The wizard: five pages, one run, nothing lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from canned_run import middle, opening

from qlora_tui.engine import preset
from qlora_tui.engine.errors import ConfigErrors, ModelError, Problem
from qlora_tui.engine.places import place
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig, from_values, values_of
from qlora_tui.engine.values import read_text
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens import launch
from qlora_tui.tui.screens.command import equivalent
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.fixlist import FixList
from qlora_tui.tui.screens.line import complete
from qlora_tui.tui.screens.settings import MAIN, MORE, Setting
from qlora_tui.tui.screens.wizard import WizardScreen


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wizard_of(app: TunerApp) -> WizardScreen:
    return next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))


@pytest.fixture
def make(desk, write_run, run_config):
    """Return a function that makes an app whose start writes a run folder, and the runs it was asked to start."""
    asked: list[RunConfig] = []

    def build(draft=None, *, start=None, **more) -> TunerApp:
        def begin(run: RunConfig, reading: Reading) -> Path:
            asked.append(run)
            return write_run([*opening(run), *middle()])[0]

        return TunerApp(start=start or begin, draft=draft, follow=None, desk=desk, on_abort=lambda: None, **more)

    build.asked = asked
    return build


async def go_to(pilot, until, app, page: str) -> None:
    """Press Enter until `page` is in sight."""
    pages = ("goal", "model", "data", "numbers", "go")
    for name in pages[1 : pages.index(page) + 1]:
        await pilot.press("enter")
        await until(pilot, lambda name=name: wizard_of(app).page.title == name)


async def test_the_demo_walks_through_on_enter_alone_and_starts(make, until, home):
    run = preset.resolve(preset="demo", config=None, flags={})
    app = make(run, demo=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        assert "qlora-tui demo --no-ui" in words(app)
        await pilot.press("enter")
        await until(pilot, lambda: app.run_screen is not None and "step 20/40" in words(app))
    assert make.asked == [run]
    assert not (place("state") / "draft.toml").exists()


async def test_every_page_shows_steps_device_and_memory(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        for page in ("model", "data", "numbers", "go"):
            await go_to(pilot, until, app, "model") if page == "model" else await pilot.press("enter")
            await until(pilot, lambda page=page: wizard_of(app).page.title == page)
            await until(pilot, lambda: "● fits" in words(app) and "of 24.0 GiB (±" in words(app))
            assert "▸" in words(app).split("\n")[0]
            assert "24.0 GiB" in words(app).split("\n")[0]
            assert "weights" in words(app)


async def test_arrows_change_values_and_the_bar_at_once(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        before = wizard_of(app).outlook.budget.total_bytes
        await pilot.press("right")
        await until(pilot, lambda: wizard_of(app).run.lora_r == 32)
        assert wizard_of(app).outlook.budget.total_bytes > before
        assert "‹ 32 ›" in words(app)
        assert "64: +" in words(app)
        await pilot.press("down", "left")
        await until(pilot, lambda: wizard_of(app).run.max_length == 1024)


async def test_typing_replaces_a_value_and_redraws_on_every_key(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("down", "4")
        await until(pilot, lambda: "at least 16" in words(app))
        assert wizard_of(app).run.max_length == 2048
        await pilot.press("0")
        await until(pilot, lambda: wizard_of(app).run.max_length == 40)
        await pilot.press("0", "0")
        await until(pilot, lambda: wizard_of(app).run.max_length == 4000)
        await pilot.press("backspace")
        await until(pilot, lambda: wizard_of(app).run.max_length == 400)


async def test_only_the_current_field_has_arrows(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("down", "down", "down", "down")
        await until(pilot, lambda: "‹ 2 ›" in words(app))
        assert words(app).count("‹") == 1


async def test_a_long_value_keeps_the_columns(make, until, run_config):
    app = make(dataclasses.replace(run_config, lora_target_modules=("q_proj", "k_proj", "v_proj"), optim="paged_adamw_8bit"))
    async with app.run_test(size=(80, 50)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("m")
        await until(pilot, lambda: "q_proj, k_proj, …" in words(app))
        at = {line.index(note) for line in words(app).split("\n") for note in ("all-linear is", "auto picks", "0 is fine") if note in line}
        assert len(at) == 1


async def test_where_one_types_letters_are_no_keys(make, until, run_config):
    app = make(dataclasses.replace(run_config, lora_r=8, gradient_checkpointing="true", per_device_train_batch_size=1))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "data")
        await until(pilot, lambda: "tip" in words(app))
        assert "tip     f " not in words(app)
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog) and "complete the path" in words(app))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is wizard_of(app))
        await pilot.press("enter")
        await until(pilot, lambda: "tip     f " in words(app))


async def test_a_file_that_came_meanwhile_is_found_on_enter(make, until, run_config, desk, monkeypatch):
    there: list[bool] = []
    looked = desk.look_at_data

    def look(self, run: RunConfig, progress=None):
        found = looked(dataclasses.replace(run, data=("x" if there else "missing",)))
        return dataclasses.replace(found, names=run.data)

    monkeypatch.setattr(type(desk), "look_at_data", look)
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "data")
        await until(pilot, lambda: "there is no such file" in words(app))
        there.append(True)
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "numbers")


async def test_a_value_that_is_none_keeps_the_page(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("1", "x")
        await until(pilot, lambda: "✖ '1x' is not a whole number" in words(app))
        await pilot.press("enter")
        await pilot.pause()
        assert wizard_of(app).page.title == "numbers"
        await pilot.press("backspace", "enter")
        await until(pilot, lambda: wizard_of(app).page.title == "go")
        assert wizard_of(app).run.lora_r == 1


async def test_back_and_forth_loses_nothing(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("right", "right")
        for page in ("data", "model", "goal"):
            await pilot.press("escape")
            await until(pilot, lambda page=page: wizard_of(app).page.title == page)
        await pilot.press("escape")
        await pilot.pause()
        assert wizard_of(app).page.title == "goal"
        await go_to(pilot, until, app, "go")
        assert wizard_of(app).run == dataclasses.replace(run_config, lora_r=64)
        assert "rank 64" in words(app)


async def test_f_lists_what_to_change_and_one_key_takes_it_or_gives_it_back(make, until, run_config):
    app = make(dataclasses.replace(run_config, max_length=16384, per_device_train_batch_size=8, gradient_checkpointing="false"))
    async with app.run_test(size=(100, 30)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await until(pilot, lambda: "✖ too big" in words(app) and "fix" in words(app))
        before = wizard_of(app).outlook.budget.total_bytes
        await pilot.press("f")
        await until(pilot, lambda: isinstance(app.screen, FixList) and "saves" in words(app))
        await pilot.press("1")
        await until(pilot, lambda: wizard_of(app).outlook.budget.total_bytes < before)
        await pilot.press("u")
        await until(pilot, lambda: wizard_of(app).outlook.budget.total_bytes == before)


async def test_the_model_list_filters_and_arrows_pick(make, until, run_config):
    app = make(RunConfig())
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What do you want?" in words(app))
        await pilot.press("end")
        await until(pilot, lambda: "something else" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "model" and "Qwen/Qwen3-8B" in words(app))
        assert "✖ too big" in words(app)
        await pilot.press("enter")
        await until(pilot, lambda: "name a model" in words(app))
        await pilot.press(*"qwen3")
        await until(pilot, lambda: "Llama" not in words(app))
        await pilot.press("down")
        await until(pilot, lambda: wizard_of(app).run.model_name_or_path == "Qwen/Qwen3-8B")
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "data")


async def test_an_unknown_model_is_looked_up_and_its_fault_told(make, until, run_config, desk, monkeypatch):
    def refuse(self, name, revision):
        raise ModelError("there is no such model", hint="check the spelling", where=name)

    monkeypatch.setattr(type(desk), "look_up", refuse)
    app = make(dataclasses.replace(run_config, model_name_or_path="nobody/nothing"))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "model")
        await pilot.press("enter")
        await until(pilot, lambda: "there is no such model" in words(app))
        assert wizard_of(app).page.title == "model"


async def test_data_are_described_and_faults_told_by_row(make, until, run_config):
    app = make(dataclasses.replace(run_config, data=("broken.jsonl",)))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "data")
        await until(pilot, lambda: "row 3 (line 3), messages: is empty" in words(app))
        await pilot.press("enter")
        await pilot.pause()
        assert wizard_of(app).page.title == "data"
        await pilot.press("ctrl+o")
        await until(pilot, lambda: "will be left out" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "numbers")
        assert wizard_of(app).run.skip_bad_rows


async def test_data_that_are_not_there_keep_the_page(make, until, run_config):
    app = make(dataclasses.replace(run_config, data=("missing.jsonl",)))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "data")
        await pilot.press("enter")
        await until(pilot, lambda: "there is no such file" in words(app))
        assert wizard_of(app).page.title == "data"


async def test_faults_at_the_start_are_listed_and_nothing_is_lost(make, until, run_config):
    def refuse(run: RunConfig, reading: Reading) -> Path:
        raise ConfigErrors([Problem("data", "no usable row", "mend it"), Problem("runs_dir", "not writable", "choose another")])

    app = make(run_config, start=refuse)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("enter")
        await until(pilot, lambda: "no usable row" in words(app) and "not writable" in words(app))
        await pilot.press("escape")
        await until(pilot, lambda: wizard_of(app).page.title == "numbers")
        assert wizard_of(app).run == run_config


async def test_a_run_is_queued_instead_and_the_page_stays_for_the_next(make, until, run_config, monkeypatch):
    asked: list[tuple[RunConfig, str]] = []

    def put(run: RunConfig, name: str, reading: Reading) -> int:
        if asked:
            raise ConfigErrors([Problem("data", "no usable row", "mend it")])
        asked.append((run, name))
        return 7

    monkeypatch.setattr(launch, "enqueue", put)
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        assert "e queues it" in words(app)
        await pilot.press("e")
        await until(pilot, lambda: "queued as 7" in words(app))
        assert asked == [(run_config, "")]
        await pilot.press("e")
        await until(pilot, lambda: "no usable row" in words(app))
        assert not wizard_of(app).starting
    assert make.asked == []


async def test_an_unexpected_fault_at_the_start_is_shown_too(make, until, run_config):
    def broken(run: RunConfig, reading: Reading) -> Path:
        raise RuntimeError("something [/odd] happened")

    app = make(run_config, start=broken)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("enter")
        await until(pilot, lambda: "something [/odd] happened" in words(app))
        assert not wizard_of(app).starting


async def test_an_unfinished_run_is_offered_the_next_time_and_forgotten_once_started(make, until, run_config, home):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "numbers")
        await pilot.press("right", "enter")
        await until(pilot, lambda: wizard_of(app).page.title == "go")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "no-run"
    again = make(None)
    async with again.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "go on where you left off" in words(again))
        await go_to(pilot, until, again, "go")
        assert wizard_of(again).run == dataclasses.replace(run_config, lora_r=32)
        await pilot.press("enter")
        await until(pilot, lambda: again.run_screen is not None)
    assert not (place("state") / "draft.toml").exists()


async def test_the_check_before_a_start_tells_how_far_it_is_and_can_be_given_up(make, until, run_config):
    import threading

    gate = threading.Event()

    def check(run: RunConfig, reading: Reading) -> Path:
        reading.progress(3 * 2**30, 4 * 2**30)
        gate.wait(20)
        reading.stopping()
        raise AssertionError("nobody stopped it")

    app = make(run_config, start=check)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("enter")
        told = app.screen.query_one("#go-faults")
        await until(pilot, lambda: "reading the data  75 % of 4.0 GiB" in words(app) and told.region.bottom <= 19)
        await pilot.press("escape")
        gate.set()
        await until(pilot, lambda: "the start was given up; nothing was begun" in words(app))
        assert wizard_of(app).page.title == "go"
        assert not wizard_of(app).starting


async def test_leaving_gives_up_the_check_before_a_start(make, until, run_config):
    import threading

    gate = threading.Event()

    def check(run: RunConfig, reading: Reading) -> Path:
        gate.wait(20)
        reading.stopping()
        raise AssertionError("nobody stopped it")

    app = make(run_config, start=check)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).starting)
        await pilot.press("ctrl+c")
        gate.set()
        await until(pilot, lambda: app.left is not None)
    assert app.left.kind == "no-run"


async def test_going_on_while_large_data_are_read_does_not_read_them_again(make, until, run_config, desk, monkeypatch):
    import threading

    gate = threading.Event()
    asked: list[RunConfig] = []
    looked = desk.look_at_data

    def look(run, progress=lambda done, total: None):
        asked.append(run)
        progress(1, 4)
        gate.wait(20)
        return looked(run)

    monkeypatch.setattr(type(desk), "look_at_data", lambda self, *given: look(*given))
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "data")
        await until(pilot, lambda: "25 %" in words(app))
        data = wizard_of(app).page
        await pilot.press("enter", "enter")
        gate.set()
        await until(pilot, lambda: wizard_of(app).page.title == "numbers")
        data._look_now()  # on a slow machine the pause after the page opened ends only now
        await pilot.pause()
    assert len(asked) == 1


async def test_leaving_while_a_run_is_being_started_stops_it(make, until, run_config, write_run):
    import threading

    gate = threading.Event()

    def slow(run: RunConfig, reading: Reading) -> Path:
        gate.wait(20)
        return write_run([*opening(run), *middle()])[0]

    app = make(run_config, start=slow)
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).starting)
        await pilot.press("ctrl+c")
        assert app.left is None
        gate.set()
        await until(pilot, lambda: app.run_screen is not None and app.run_screen.view.stopping)
        assert '"stop"' in (app.folder / "commands.jsonl").read_text()


async def test_the_caller_is_told_once_that_a_start_is_near(make, until, run_config):
    told: list[bool] = []
    app = make(run_config, on_ready=lambda: told.append(True))
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, until, app, "go")
        await pilot.press("escape", "enter")
        await until(pilot, lambda: wizard_of(app).page.title == "go")
    assert told == [True]


@pytest.mark.parametrize("size", [(120, 36), (60, 20), (39, 10)])
async def test_the_wizard_works_at_every_size(make, until, run_config, size):
    app = make(run_config)
    async with app.run_test(size=size) as pilot:
        await go_to(pilot, until, app, "go")
        assert "memory" in words(app)
        await pilot.press("enter")
        await until(pilot, lambda: app.run_screen is not None)
    assert make.asked == [run_config]


async def test_ascii_mode_draws_nothing_else(make, until, run_config):
    app = make(run_config, ascii_only=True)
    async with app.run_test(size=(80, 24)) as pilot:
        for page in ("goal", "model", "data", "numbers", "go"):
            await go_to(pilot, until, app, "model") if page == "model" else await pilot.press(*(["enter"] if page != "goal" else []))
            await until(pilot, lambda page=page: wizard_of(app).page.title == page)
            await pilot.pause()
            assert words(app).isascii(), [char for char in words(app) if not char.isascii()]


async def test_help_comes_from_the_bindings(make, until, run_config):
    app = make(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "as you said on the command line" in words(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpDialog) and "go on; on the last page" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.screen is wizard_of(app))


def command_values(text: str) -> dict[str, object]:
    """Read the command as the command line would."""
    import shlex

    from qlora_tui.engine.spec import find_key

    named = {"--model": "model_name_or_path", "--data": "data", "--runs-dir": "runs_dir"}
    found: dict[str, object] = {}
    parts = iter(shlex.split(text)[1:])
    for part in parts:
        if part in named:
            found[named[part]] = read_text(find_key(named[part]), next(parts))
        elif part == "--set":
            name, value = next(parts).split("=", 1)
            found[name] = read_text(find_key(name), value)
    return found


def test_the_equivalent_command_says_the_same_run(run_config):
    run = dataclasses.replace(
        run_config, data=("a b.jsonl", "c'd.jsonl"), lora_r=7, learning_rate=3.3e-5, gradient_checkpointing="false", max_time=90.5
    )
    assert from_values(command_values(equivalent(run))) == run


def test_the_command_names_a_preset_and_only_what_differs(run_config):
    base = dataclasses.replace(run_config, lora_r=64)
    assert equivalent(base, preset="chat", base=base) == "qlora-tui --no-ui --preset chat"
    assert equivalent(dataclasses.replace(base, seed=1), preset="demo", base=base) == "qlora-tui demo --no-ui --set seed=1"


@pytest.mark.parametrize("setting", [*MAIN, *MORE], ids=lambda setting: setting.name)
def test_every_step_of_every_field_is_a_value_the_table_takes(setting: Setting, run_config):
    for direction in (1, -1):
        run = run_config
        for _ in range(12):
            run = setting.stepped(run, direction)
            assert not [fault for fault in problems(run) if fault.where == setting.name]
            assert from_values(values_of(run)) == run
    assert setting.help


def test_paths_are_completed(tmp_path):
    (tmp_path / "chats.jsonl").write_text("")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "x\x1b[31m").write_text("")
    assert complete(f"{tmp_path}/ch", "builtin:python-docs") == f"{tmp_path}/chats.jsonl"
    assert complete(f"{tmp_path}/co", "builtin:python-docs") == f"{tmp_path}/corpus/"
    assert complete(f"{tmp_path}/nothing", "builtin:python-docs") is None
    assert complete(f"{tmp_path}/x", "builtin:python-docs") is None
    assert complete("builtin:p", "builtin:python-docs") == "builtin:python-docs"
    assert complete("buil", "builtin:python-docs") == "builtin:python-docs"
    assert complete("", "builtin:python-docs") is None
