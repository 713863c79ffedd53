"""The numbers page: every setting that matters, its cost told as it changes; the rarer ones fold out."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.unusual import Unusual, unusual
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.effects import Scene, effect_of, note_of
from qlora_tui.tui.screens.fields import FieldRow
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.settings import MAIN, MORE, Setting

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen


class NumbersPage(Page):
    """Fields in one column; beneath them what the current one does to memory, time and quality."""

    title = "numbers"
    open = False
    """Whether the rarer settings are folded out."""

    def __init__(self, wizard: WizardScreen) -> None:
        """Make the fields once: every key that is pressed goes through them."""
        super().__init__(wizard)
        self._all = [FieldRow(setting, wizard.run, ascii_only=wizard.ascii_only) for setting in (*MAIN, *MORE)]

    def compose(self) -> ComposeResult:
        """Lay out the fields; the rarer ones follow below a line that folds them out."""
        with VerticalScroll(can_focus=False, id="fields"):
            yield from self._all[: len(MAIN)]
            yield Static("", markup=False, id="more-line")
            for field in self._all[len(MAIN) :]:
                field.display = False
                yield field
        yield Static("", markup=False, id="field-help")

    def enter(self) -> None:
        """Show the run as it is and go to the first field."""
        self.refresh_run()
        self._fields()[0].focus()

    def refresh_run(self, *, anew: bool = False) -> None:
        """Show the wizard's run in every field in sight; `anew`: also in the one that is being typed in."""
        scene = self._scene()
        odd = self._unusual(scene)
        faults = {problem.where: one_line(problem.message, limit=120) for problem in problems(scene.run)}
        for field in self._fields():
            name = field.setting.name
            if name in faults:
                beside: Part = (f"✖ {faults[name]}", cells.BAD)
            elif name in odd:
                beside = (f"▲ {odd[name].short}", cells.WARN)
            else:
                beside = (note_of(field.setting, scene), cells.DIM)
            field.use(scene.run, beside, anew=anew)
        self._draw_more_line(scene.run, odd)
        focused = next((field for field in self._fields() if field.has_focus), None)
        if focused is not None:
            self._explain(focused.setting, scene, odd)

    def fold(self) -> None:
        """Show the rarer settings and go to the first of them, or hide them again."""
        self.open = not self.open
        for field in self._all[len(MAIN) :]:
            field.display = self.open
        self.refresh_run()
        self._all[len(MAIN) if self.open else 0].focus()

    def commit(self) -> bool:
        """Go on only when no field holds something that is not a value."""
        wrong = next((field for field in self._all if field.fault), None)
        if wrong is None:
            return True
        if not wrong.display:
            self.fold()
        wrong.focus()
        return False

    @property
    def half_typed(self) -> bool:
        """Whether a field holds something that is not a value."""
        return any(field.fault for field in self._all)

    def drop_typing(self) -> None:
        """Show the values again in place of what is none."""
        for field in self._all:
            field.use(self.wizard.run, field.beside, anew=True)
        self.refresh_run()
        self.wizard.redraw_keys()

    def _fields(self) -> list[FieldRow]:
        """Return the fields in sight."""
        return self._all if self.open else self._all[: len(MAIN)]

    def _scene(self) -> Scene:
        wizard = self.wizard
        return Scene(wizard.run, wizard.outlook, wizard.data_of_run(), wizard.desk.model(wizard.run), wizard.desk.machine())

    def _unusual(self, scene: Scene) -> dict[str, Unusual]:
        return unusual(scene.run, scene.known)

    @on(FieldRow.Changed)
    def _field_changed(self, event: FieldRow.Changed) -> None:
        event.stop()
        self.wizard.edit(event.run, event.group)
        self.refresh_run()

    @on(FieldRow.Entered)
    def _field_entered(self, event: FieldRow.Entered) -> None:
        event.stop()
        scene = self._scene()
        self._explain(event.setting, scene, self._unusual(scene))

    def _draw_more_line(self, run: RunConfig, odd: dict[str, Unusual]) -> None:
        """Say what is folded away, and whether something there is not as usual."""
        hidden = [setting for setting in MORE if values_of(run)[setting.name] != KEYS[setting.name].default]
        warned = [setting.label for setting in MORE if setting.name in odd]
        parts: list[Part] = [(" more ", "bold"), ("▾" if self.open else "▸", cells.MAIN), (" m ", f"bold {cells.MAIN}")]
        if self.open:
            parts.append(("folds these away", cells.DIM))
        elif warned:
            parts.append((f"▲ {', '.join(warned)}", cells.WARN))
        elif hidden:
            parts.append((", ".join(f"{setting.label} {setting.shown(run)}" for setting in hidden), ""))
        else:
            parts.append(("alpha, dropout, layers, optimizer, schedule, filters, hold-out, seed …", cells.DIM))
        width = max(20, self.wizard.size.width - 5)
        self.query_one("#more-line", Static).update(self.text(cells.assemble(parts).truncate(width, ellipsis=True)), layout=False)

    def _explain(self, setting: Setting, scene: Scene, odd: dict[str, Unusual]) -> None:
        """Say what the field does to memory, time and quality, as the budget measured it; a warning comes first."""
        width, room = max(20, self.wizard.size.width - 4), max(1, self.query_one("#field-help").size.height or 2)
        measured, words = effect_of(setting, scene), setting.effect or setting.help
        lines: list[Content] = []
        if warning := odd.get(setting.name):
            lines += _wrapped(f"▲ {warning.why}", width, cells.WARN)
        if measured and len(words) + len(measured) + 2 <= width:
            lines.append(Content.assemble((f" {words} ", ""), (f" {measured}", cells.MAIN)))
        else:
            last = _wrapped(measured, width, cells.MAIN)
            lines += [*_wrapped(words, width, "")[: max(1, room - len(lines) - len(last))], *last]
        if setting.effect:
            lines += _wrapped(f"{setting.name}: {setting.help}", width, cells.DIM)
        self.query_one("#field-help", Static).update(self.text(cells.stack(lines[:room])), layout=False)


def _wrapped(text: str, width: int, style: str) -> list[Content]:
    return [Content.styled(f" {line}", style) for line in textwrap.wrap(text, width)]
