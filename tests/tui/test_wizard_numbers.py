"""The numbers page and the last one: what a field does, what is unusual, the list of fixes, undo, the whole plan."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from canned_run import QuietDesk
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.engine import machine, models
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.rules import bounds
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import filters
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.datalook import DataLook, with_lengths
from qlora_tui.tui.lengths import Lengths
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.effects import Scene, effect_of, note_of
from qlora_tui.tui.screens.fields import FieldRow
from qlora_tui.tui.screens.fixlist import FixList
from qlora_tui.tui.screens.numbers import NumbersPage
from qlora_tui.tui.screens.settings import MAIN, MORE, Setting
from qlora_tui.tui.screens.wizard import WizardScreen

RUN = RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))
BIG = dataclasses.replace(RUN, max_length=16_384, per_device_train_batch_size=8, gradient_checkpointing="false")


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wizard_of(app: TunerApp) -> WizardScreen:
    return next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))


def app_of(run: RunConfig, **more) -> TunerApp:
    return TunerApp(start=None, draft=run, follow=None, desk=QuietDesk(), on_abort=lambda: None, **more)


async def to_page(pilot, until, app, page: str = "numbers") -> None:
    pages = ("goal", "model", "data", "numbers", "go")
    for name in pages[1 : pages.index(page) + 1]:
        await pilot.press("enter")
        await until(pilot, lambda name=name: wizard_of(app).page.title == name)


def scene_of(run: RunConfig, look: DataLook | None = None) -> Scene:
    desk = QuietDesk()
    return Scene(run, desk.outlook(run, look), look, desk.model(run), desk.machine())


def setting(name: str) -> Setting:
    return next(one for one in (*MAIN, *MORE) if one.name == name)


KEYS = ("up", "down", "left", "right", "m", "u", "f", "1", "2", "0", "e", "minus", "full_stop", "backspace", "x", "a", "k", "home", "space")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=30))
def test_no_keys_on_the_numbers_page_raise_or_lose_a_value(keys):
    async def press() -> None:
        app = app_of(RUN)
        async with app.run_test(size=(80, 24)) as pilot:
            for page in ("model", "data", "numbers"):
                await pilot.press("enter")
                while wizard_of(app).page.title != page:
                    await pilot.pause(0.01)
            await pilot.press(*keys)
            if isinstance(app.screen, FixList):
                await pilot.press("escape")
            await pilot.pause()
            wizard = wizard_of(app)
            assert bounds(wizard.run) == []
            shown = [field for field in wizard.query(FieldRow) if field.display]
            assert all(field.run == wizard.run for field in shown)
            assert [field.setting.name for field in shown][: len(MAIN)] == [one.name for one in MAIN]
            while wizard.undone or wizard.page.half_typed:
                wizard.action_undo()
            await pilot.pause()
            assert wizard.run == RUN
            assert not [field.fault for field in shown if field.fault]

    asyncio.run(press())


async def test_rare_settings_fold_out_and_in_and_say_what_is_changed_there(home, until):
    app = app_of(dataclasses.replace(RUN, lora_alpha=16, seed=7))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_page(pilot, until, app)
        await until(pilot, lambda: "more ▸ m alpha 16, seed 7" in words(app))
        assert "dropout" not in words(app)
        await pilot.press("m")
        await until(pilot, lambda: "more ▾" in words(app) and "dropout" in words(app) and "‹ 16 ›" in words(app))
        await pilot.press("m")
        await until(pilot, lambda: "dropout" not in words(app))


async def test_what_is_unusual_stands_beside_the_field_and_blocks_nothing(home, until):
    app = app_of(dataclasses.replace(RUN, learning_rate=1e-3, lora_alpha=512))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_page(pilot, until, app)
        await until(pilot, lambda: "▲ high: may diverge" in words(app) and "▲ alpha 512 is 32x this" in words(app))
        assert "more ▸ m ▲ alpha" in words(app)
        assert "▲ Alpha at 32 times the rank" in words(app)
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "go")


async def test_values_that_do_not_go_together_are_told_beside_the_field(home, until):
    app = app_of(dataclasses.replace(RUN, use_dora=True, lora_dropout=0.1))
    async with app.run_test(size=(120, 50)) as pilot:
        await to_page(pilot, until, app)
        await pilot.press("m")
        await until(pilot, lambda: "✖ with DoRA the base's part" in words(app))


async def test_undo_takes_back_what_was_typed_at_a_stretch_and_then_the_step_before(home, until):
    app = app_of(RUN)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_page(pilot, until, app)
        assert "undo" not in words(app)
        await pilot.press("right", "down", *"4000")
        await until(pilot, lambda: wizard_of(app).run.max_length == 4000 and "u undo" in words(app))
        await pilot.press("u")
        await until(pilot, lambda: wizard_of(app).run.max_length == 2048 and "‹ 2048 ›" in words(app))
        await pilot.press("u")
        await until(pilot, lambda: wizard_of(app).run == RUN)


async def test_letters_are_typed_where_a_value_may_hold_them(home, until):
    app = app_of(RUN)
    async with app.run_test(size=(80, 50)) as pilot:
        await to_page(pilot, until, app)
        await pilot.press("m", "down", "down", *"q_proj,up_proj")
        await until(pilot, lambda: wizard_of(app).run.lora_target_modules == ("q_proj", "up_proj"))
        assert app.left is None
        assert "q quit" not in words(app)
        await pilot.press("up")
        await until(pilot, lambda: "q quit" in words(app))


async def test_the_list_of_fixes_says_what_each_saves_and_costs(home, until):
    app = app_of(BIG)
    async with app.run_test(size=(100, 30)) as pilot:
        await to_page(pilot, until, app)
        await until(pilot, lambda: "✖ too big" in words(app))
        needed = wizard_of(app).outlook.budget.total_bytes
        await pilot.press("f")
        await until(pilot, lambda: isinstance(app.screen, FixList) and "1 " in words(app) and "then it fits" in words(app))
        assert "saves" in words(app)
        assert "the result stays the same" in words(app) or "knows less" in words(app)
        assert 1 <= len(wizard_of(app).remedies) <= 5
        before = words(app).split("\n")[-6]
        await pilot.press("1")
        await until(pilot, lambda: wizard_of(app).outlook.budget.fits and "u: give back (1)" in words(app))
        assert words(app).split("\n")[-6] != before  # the bar beneath follows
        await pilot.press("u")
        await until(pilot, lambda: wizard_of(app).outlook.budget.total_bytes == needed)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is wizard_of(app))
        assert wizard_of(app).run == BIG


async def test_the_last_page_tells_the_whole_plan(home, until):
    app = app_of(dataclasses.replace(RUN, watch_stop=("spike", "drift"), watch_rollback=("gradient",)))
    async with app.run_test(size=(120, 40)) as pilot:
        await to_page(pilot, until, app, "go")
        await until(pilot, lambda: "starts the run" in words(app))
        shown = " ".join(words(app).split())
        for told in (
            "8.2 B weights",
            "rank 16, alpha 32",
            "weights 5.7, adapter",
            "an estimate from the card's data sheet",
            "rented (A100 80GB) the card is paid for after",
            "such runs; here: 450 W and 100 W of the rest, $0.17 - 0.29 a kWh, the card's share",
            "the newest 3, the best and the last healthy one stay, up to",
            "runs/DATE-TIME-qwen3-8b/",
            "numbers that are not finite, spike, drift; goes back to a healthy checkpoint on gradient",
            "qlora-tui --no-ui --model Qwen/Qwen3-8B --data chats.jsonl",
        ):
            assert told in shown, told


async def test_a_long_command_stands_whole_under_the_plan(home, until):
    changed = {"lora_r": 7, "lora_alpha": 13, "seed": 5, "num_train_epochs": 1.25, "learning_rate": 3.3e-4, "max_length": 777}
    app = app_of(dataclasses.replace(RUN, **changed, warmup_steps=0.07, weight_decay=0.02, save_steps=17, eval_steps=19))
    async with app.run_test(size=(60, 20)) as pilot:
        await to_page(pilot, until, app, "go")
        await until(pilot, lambda: "under the plan; c copies it" in words(app))
        await pilot.press("end")
        await until(pilot, lambda: "save_steps=17" in words(app))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 36)])
@pytest.mark.parametrize("ascii_only", [False, True])
async def test_every_page_has_its_bar_time_keys_and_help_at_every_size(home, until, size, ascii_only):
    app = app_of(RUN, ascii_only=ascii_only)
    async with app.run_test(size=size) as pilot:
        for page in ("goal", "model", "data", "numbers", "go"):
            if page != "goal":
                await pilot.press("enter")
            await until(pilot, lambda page=page: wizard_of(app).page.title == page and "memory" in words(app))
            await until(pilot, lambda: " min (" in words(app) and "fits" in words(app))
            shown = words(app)
            assert shown.isascii() or not ascii_only
            assert "go on" in shown.split("\n")[-1]
            await pilot.press("f1" if wizard_of(app).page.types else "question_mark")
            await until(pilot, lambda: isinstance(app.screen, HelpDialog))
            told = words(app)
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is wizard_of(app))
            for key in {"numbers": ("the next usual value", " m ", "  u "), "data": ("F2", "F5"), "go": ("c  copy",)}.get(page, ()):
                assert key in told or key == "  u ", (page, key)


async def test_without_colour_the_state_is_still_told_in_words(home, until, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    app = app_of(BIG)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_page(pilot, until, app)
        await until(pilot, lambda: "✖ too big" in words(app) and "fix " in words(app))


async def test_a_changed_run_is_kept_even_when_the_screen_is_left_in_between(home, until):
    app = app_of(RUN)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_page(pilot, until, app)
        await pilot.press("right")
        await until(pilot, lambda: wizard_of(app).run.lora_r == 32)
        await pilot.press("q")
        await until(pilot, lambda: app.left is not None)
    assert QuietDesk().load_draft() == dataclasses.replace(RUN, lora_r=32)


def test_every_usual_field_says_what_it_does_to_memory_time_or_quality():
    assert all(one.effect.endswith(".") and len(one.effect) < 110 for one in MAIN)


def test_the_budget_measures_what_the_next_value_costs():
    scene = scene_of(RUN)
    assert "MiB a doubling" in note_of(setting("lora_r"), scene)
    assert effect_of(setting("lora_r"), scene).startswith("32: +")
    assert "1.5x the time" in effect_of(setting("num_train_epochs"), scene)
    assert effect_of(setting("learning_rate"), scene) == ""
    assert note_of(setting("per_device_train_batch_size"), scene).startswith("takes ")
    assert note_of(setting("gradient_checkpointing"), scene) == "takes none: all activations fit"
    tight = scene_of(dataclasses.replace(RUN, memory_limit_gib=10.0))
    assert "of 36 layers" in note_of(setting("gradient_checkpointing"), tight)
    assert note_of(setting("method"), scene) == "weights take 5.7 GiB"


def test_a_rank_is_weighed_with_all_else_as_planned():
    """The planner spends a changed rank elsewhere; what is told is what the rank alone does."""
    desk, double = QuietDesk(), dataclasses.replace(RUN, lora_r=32)
    planned = desk.outlook(RUN).plan.run
    spec, card = desk.model(RUN), machine.find_card("RTX 4090")
    from qlora_tui.engine.budget import estimate

    alone = estimate(spec, dataclasses.replace(planned, lora_r=32), card).total_bytes - estimate(spec, planned, card).total_bytes
    assert alone > 0
    from qlora_tui.tui import words as figures

    assert f"32: +{figures.size(alone)}," in effect_of(setting("lora_r"), scene_of(RUN))
    assert double != planned


def test_without_a_model_nothing_is_made_up():
    scene = scene_of(RunConfig())
    for one in (*MAIN, *MORE):
        assert "GiB" not in note_of(one, scene) or one.name == "memory_limit_gib"
        assert "iB" not in effect_of(one, scene)


@pytest.mark.parametrize("one", [*MAIN, *MORE], ids=lambda one: one.name)
def test_words_exist_for_every_field_and_any_start(one):
    look = with_lengths(DataLook(RUN.data, "messages", "", 500), Lengths(tuple(range(10, 4010, 8)), measured=True, whole=True))
    for run in (RUN, BIG, dataclasses.replace(RUN, max_steps=10, lora_r=1024, method="auto", gradient_checkpointing="7")):
        assert note_of(one, scene_of(run, look))
        assert effect_of(one, scene_of(run, look)).count("\n") == 0


async def test_what_is_no_value_gets_one_sentence_and_is_dropped_first(home, until):
    with pytest.raises(ConfigError):
        setting("lora_r").read(RUN, "many")
    app = app_of(RUN)
    async with app.run_test(size=(60, 20)) as pilot:
        await to_page(pilot, until, app)
        await pilot.press("right", "0")
        await until(pilot, lambda: "✖ 0 is out of range; it must be at" in words(app) and "u undo" in words(app))
        await pilot.press("u")
        await until(pilot, lambda: "out of range" not in words(app))
        assert wizard_of(app).run.lora_r == 32


LOOK = DataLook(("x",), "messages", "", 100, copies=(10, 5, 50))


def test_filters_say_what_they_cost_in_rows_and_tokens():
    look = with_lengths(LOOK, Lengths((10, 20, 30, 40), measured=True))
    run = RunConfig(max_length=25)
    assert filters.too_long(look, run) == (50, 1750)
    assert filters.too_long(look, dataclasses.replace(run, too_long="cut")) == (50, 500)
    assert filters.too_long(look, dataclasses.replace(run, too_long="split")) == (0, 0)
    assert filters.copies(look, "exact") == (20, 500)
    assert filters.copies(look, "near") == (30, 750)
    assert filters.known(look, run, None) == (0, 0)
    assert filters.too_long(LOOK, run) == (0, 0)


async def test_copies_are_left_out_by_a_key_and_the_steps_follow(home, until, monkeypatch):
    found = with_lengths(DataLook(RUN.data, "messages", "", 1000, copies=(400, 0, 1000)), Lengths(tuple(range(100, 300))))
    monkeypatch.setattr(QuietDesk, "look_at_data", lambda self, run, progress=None: found)
    app = app_of(RUN)
    async with app.run_test(size=(120, 36)) as pilot:
        await to_page(pilot, until, app, "data")
        await until(pilot, lambda: "F5 would leave out about 400 rows with" in words(app))
        steps = wizard_of(app).outlook.steps
        await pilot.press("f5")
        await until(pilot, lambda: "left out: about 400 rows with" in words(app))
        assert wizard_of(app).run.filter_duplicates == "exact"
        assert wizard_of(app).outlook.steps < steps
        await pilot.press("f5", "f5")
        await until(pilot, lambda: wizard_of(app).run.filter_duplicates == "off")


def test_the_catalogue_has_the_models_of_these_tests():
    assert models.find("Qwen/Qwen3-8B").num_hidden_layers == 36
    assert NumbersPage.title == "numbers"
