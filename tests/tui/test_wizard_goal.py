"""The first two pages: what one wants, what fits this card best, and models on this disk."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from canned_run import QuietDesk

from qlora_tui.engine import machine, models, preset
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.screens import shelves
from qlora_tui.tui.screens.desk import Desk, Ready
from qlora_tui.tui.screens.goal import beginnings, best_first, ready_made
from qlora_tui.tui.screens.wizard import WizardScreen

GATED = "meta-llama/Llama-3.1-8B-Instruct"


class CardDesk(QuietDesk):
    """A desk with a card of one's choice."""

    __slots__ = ("card",)

    def __init__(self, card: str) -> None:
        super().__init__()
        self.card = card

    def machine(self) -> machine.Machine:
        return machine.find_card(self.card) if self.card else machine.Machine("laptop", "cpu", 16 << 30, 2 << 30, cores=4)


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wizard_of(app: TunerApp) -> WizardScreen:
    return next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))


def app_of(desk: Desk, draft: RunConfig | None = None, **more) -> TunerApp:
    return TunerApp(start=None, draft=draft, follow=None, desk=desk, on_abort=lambda: None, **more)


def goal(name: str) -> preset.Goal:
    return next(goal for goal in preset.GOALS if goal.name == name)


@pytest.mark.parametrize(
    ("card", "name", "first"),
    [
        ("RTX 4090", "chat", "chat-14b-24gb"),
        ("RTX 3060 12GB", "chat", "chat-4b-12gb"),
        ("RTX 4060 8GB", "chat", "chat-2b-8gb"),
        ("H100 80GB", "chat", "chat-32b-80gb"),
        ("L40S", "chat", "long-8b-48gb"),
        ("RTX 4060 8GB", "code", "code-2b-8gb"),
        ("RTX 4090", "code", "code-7b-24gb"),
        ("RTX 4060 8GB", "qa", "qa-2b-8gb"),
        ("", "chat", "chat-2b-8gb"),
    ],
)
def test_what_fits_this_card_best_comes_first(home, card, name, first):
    offered = ready_made(CardDesk(card), goal(name))
    assert offered[0].preset == first
    outlooks = [CardDesk(card).outlook(offer.run) for offer in offered]
    fits = [outlook is not None and outlook.budget.fits for outlook in outlooks]
    assert fits == sorted(fits, reverse=True)


def test_without_a_graphics_card_trying_it_comes_first(home):
    assert beginnings(CardDesk(""), None, demo=False)[0].goal == goal("try")
    assert beginnings(CardDesk("RTX 4090"), None, demo=False)[0].goal == goal("chat")


def test_goals_without_a_ready_made_run_are_not_asked_for(home, monkeypatch):
    desk = CardDesk("RTX 4090")
    monkeypatch.setattr(CardDesk, "presets", lambda self: [Ready("x", "x", "x.", "", RunConfig(model_name_or_path=GATED), "code")])
    assert [offer.goal.name for offer in beginnings(desk, None, demo=False) if offer.goal] == ["code"]


async def test_a_goal_leads_to_its_ready_made_runs_with_fit_memory_time_and_why(home, until):
    app = app_of(CardDesk("RTX 4090"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "a chat assistant" in words(app) and "● fits" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: "what fits this card best comes first" in words(app))
        shown = words(app)
        assert "chat, 14 B on 24 GB" in shown
        assert re.search(r"14\.8 B · (19|20|21)\.\d GiB · ", shown)  # what the budget says to the digit is tested there
        assert "for 1,000 rows of 512 tokens" in shown
        assert "The largest open model" in shown
        await pilot.press("down", "enter")
        await until(pilot, lambda: wizard_of(app).page.title == "model")
        assert wizard_of(app).run == preset.resolve(preset="chat-8b-24gb")
        assert wizard_of(app).command() == "qlora-tui --no-ui --preset chat-8b-24gb"


async def test_escape_asks_for_the_goal_again_and_the_same_answer_keeps_what_was_changed(home, until):
    app = app_of(CardDesk("RTX 4090"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "What do you want?" in words(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: "Answers about your domain" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: wizard_of(app).page.title == "model")
        wizard_of(app).change(dataclasses.replace(wizard_of(app).run, lora_r=64))
        await pilot.press("escape", "escape")
        await until(pilot, lambda: "What do you want?" in words(app))
        await pilot.press("down")
        await until(pilot, lambda: wizard_of(app).outlook.plan.run.lora_r == 8)  # the bar shows what classification needs
        assert wizard_of(app).run.lora_r == 64  # which is looked at, not taken
        await pilot.press("up", "enter", "enter")
        await until(pilot, lambda: wizard_of(app).page.title == "model")
        assert wizard_of(app).run.lora_r == 64
        assert wizard_of(app).run.model_name_or_path == "Qwen/Qwen3-8B"


async def test_a_model_that_needs_a_licence_is_shown_as_such(home, until, monkeypatch):
    run = RunConfig(model_name_or_path=GATED)
    monkeypatch.setattr(CardDesk, "presets", lambda self: [Ready("x", "gated", "Why not.", "RTX 4090", run, "chat")])
    app = app_of(CardDesk("RTX 4090"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "a chat assistant" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: "▲ needs a licence accepted on the hub, and a login" in words(app))


def folder_with(path: Path, *, weights: bool = True) -> Path:
    path.mkdir(parents=True)
    shutil.copy(Path(models.__file__).with_name("smollm2-135m") / "config.json", path)
    if weights:
        (path / "model.safetensors").write_bytes(b"")
    return path


def test_folders_with_a_model_are_found_near_by(tmp_path, monkeypatch):
    folder_with(tmp_path / "mine")
    folder_with(tmp_path / "models" / "other")
    folder_with(tmp_path / "models" / "config-only", weights=False)
    folder_with(tmp_path / "a" / "b" / "c" / "too-deep")
    folder_with(tmp_path / ".hidden" / "one")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{")
    (tmp_path / "models" / "broken" / "x.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    assert [name for name, _ in shelves.folders(".")] == ["./mine", "./models/other"]
    assert [name for name, _ in shelves.folders("models/")] == ["./models/other"]
    assert [name for name, _ in shelves.folders(str(tmp_path / "mine"))] == [str(tmp_path / "mine")]
    assert shelves.folders(str(tmp_path / "nowhere")) == []


def test_a_huge_tree_is_given_up(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number:03}").mkdir()
    folder_with(tmp_path / "zzz")
    assert len(shelves.folders(str(tmp_path))) == 1
    monkeypatch.setattr(shelves, "_MOST_LOOKED_AT", 20)
    assert shelves.folders(str(tmp_path)) == []


def test_the_shape_of_a_folder_is_read_again_when_its_config_changes(tmp_path):
    folder = folder_with(tmp_path / "mine")
    first = shelves.shape_of(str(folder))
    assert first is shelves.shape_of(str(folder))
    text = (folder / "config.json").read_text().replace('"num_hidden_layers": 30', '"num_hidden_layers": 12')
    (folder / "config.json").write_text(text)
    assert shelves.shape_of(str(folder)).num_hidden_layers == 12
    assert shelves.shape_of("no\0name") is None


async def test_a_typed_folder_lists_the_models_in_it(home, until, tmp_path):
    folder_with(tmp_path / "shelf" / "mine")
    app = app_of(CardDesk("RTX 4090"), RunConfig(lora_r=8))
    async with app.run_test(size=(120, 36)) as pilot:
        await until(pilot, lambda: "as you said" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: "Qwen/Qwen3-8B" in words(app))
        wizard_of(app).page.query_one("#model-name").value = f"{tmp_path}/shelf/"
        name = f"{tmp_path}/shelf/mine"
        await until(pilot, lambda: any(choice.name == name and choice.place == "on disk" for choice in wizard_of(app).page._shown))
        await pilot.press("down")
        await until(pilot, lambda: wizard_of(app).run.model_name_or_path == name and "● fits" in words(app))


async def test_every_model_says_whether_it_fits_and_which_need_a_login(home, until):
    class Catalogue(CardDesk):
        __slots__ = ()
        models = Desk.models

    app = app_of(Catalogue("RTX 3060 12GB"), RunConfig(lora_r=8))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "as you said" in words(app))
        await pilot.press("enter")
        await until(pilot, lambda: "at least" in words(app))
        await pilot.press(*"llama-3.1")
        await until(pilot, lambda: "✖ too big" in words(app) and "● fits" in words(app) and "▲ login" in words(app))


def test_presets_of_any_order_are_ranked_alike(home):
    desk = CardDesk("RTX 4090")
    ready = desk.presets()
    assert [one.name for one in best_first(desk, ready)] == [one.name for one in best_first(desk, ready[::-1])]
