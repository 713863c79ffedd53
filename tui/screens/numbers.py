"""The numbers page: every setting that matters, its cost in memory told as it changes."""

from __future__ import annotations

import textwrap

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.lengths import TOO_LONG, Lengths, share
from qlora_tui.tui.panels import cells
from qlora_tui.tui.screens.fields import FieldRow
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.settings import MAIN, MORE, Setting


class NumbersPage(Page):
    """Fields in one column; the sentence about the current one stands beneath."""

    title = "numbers"

    def compose(self) -> ComposeResult:
        """Lay out the fields; the rarer ones follow below a line."""
        with VerticalScroll(can_focus=False, id="fields"):
            for setting in MAIN:
                yield FieldRow(setting, self.wizard.run, ascii_only=self.wizard.ascii_only)
            yield Static("", markup=False, id="more-line")
            for setting in MORE:
                yield FieldRow(setting, self.wizard.run, ascii_only=self.wizard.ascii_only)
        yield Static("", markup=False, id="field-help")

    def on_mount(self) -> None:
        """Write the line between the usual and the rarer fields."""
        line = Content.styled(" ── rarely changed ──", cells.DIM)
        self.query_one("#more-line", Static).update(self.text(line))

    def enter(self) -> None:
        """Show the run as it is and go to the first field."""
        self.use(self.wizard.run)
        self.query(FieldRow).first().focus()

    def use(self, run: RunConfig) -> None:
        """Show another run in every field."""
        look = self.wizard.data_of_run()
        lengths = look.lengths if look else Lengths()
        for field in self.query(FieldRow):
            field.use(run, note_of(field.setting, run, lengths))

    def commit(self) -> bool:
        """Go on only when no field holds something that is not a value."""
        wrong = next((field for field in self.query(FieldRow) if field.fault), None)
        if wrong is not None:
            wrong.focus()
        return wrong is None

    @on(FieldRow.Changed)
    def _field_changed(self, event: FieldRow.Changed) -> None:
        event.stop()
        self.wizard.change(event.run)
        self.use(event.run)
        focused = next((field for field in self.query(FieldRow) if field.has_focus), None)
        if focused is not None:
            self._explain(focused.setting)

    @on(FieldRow.Entered)
    def _field_entered(self, event: FieldRow.Entered) -> None:
        event.stop()
        self._explain(event.setting)

    def _explain(self, setting: Setting) -> None:
        costs, width = self._cost(setting), max(20, self.wizard.size.width - 4)
        if costs and len(setting.help) + len(costs) + 2 <= width:
            lines = [cells.assemble([(f" {setting.help}  ", ""), (costs, cells.MAIN)])]
        else:
            told = textwrap.wrap(setting.help, width)[: 1 if costs else 2]
            lines = [*[Content(f" {line}") for line in told], *([Content.styled(f" {costs}", cells.MAIN)] if costs else [])]
        self.query_one("#field-help", Static).update(self.text(cells.stack(lines)), layout=False)

    def _cost(self, setting: Setting) -> str:
        """Say what one value more would do to memory, by asking the budget."""
        run = self.wizard.run
        after = setting.stepped(run, 1)
        now, then = self.wizard.outlook, self.wizard.desk.outlook(after, self.wizard.data_of_run())
        if now is None or then is None or after == run:
            return ""
        change = then.budget.total_bytes - now.budget.total_bytes
        if abs(change) < 1 << 20:
            return "Memory stays the same."
        return f"{one_line(setting.shown(after))}: {'+' if change > 0 else '-'}{words.size(abs(change))} of memory."


def note_of(setting: Setting, run: RunConfig, lengths: Lengths = Lengths()) -> str:  # noqa: B008  frozen, so one may be shared
    """Return the half-sentence beside a field; some depend on the run and on its rows."""
    if setting.name == "max_length" and lengths.tokens:
        over = lengths.over(run.max_length)
        if not over:
            return f"tokens; your longest row has {'' if lengths.measured else 'about '}{lengths.longest:,}"
        return f"{'' if lengths.measured else 'about '}{share(over)} of your rows are longer: {TOO_LONG[run.too_long]}"
    if setting.name == "gradient_accumulation_steps":
        return f"{rows_per_step(run):,} rows a step; costs no memory"
    if setting.name == "num_train_epochs" and run.max_steps:
        return f"{run.max_steps:,} steps at most"
    return setting.note
