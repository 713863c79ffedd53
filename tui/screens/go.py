"""The last page: what will run, in words and as a command, and the key that starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.engine import units
from qlora_tui.engine.errors import ConfigErrors, EngineError, Problem
from qlora_tui.engine.spec import RunConfig, rows_at_once, rows_per_step
from qlora_tui.engine.text import one_line, redact, safe_text
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import used_rows
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens.command import on_lines
from qlora_tui.tui.screens.desk import Outlook
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.settings import MAIN, MORE, show

_LABEL = 12


class GoPage(Page):
    """A summary to read once, and Enter to start."""

    title = "go"

    def compose(self) -> ComposeResult:
        """Lay out the summary and the place for faults."""
        with VerticalScroll(id="go-scroll"):
            yield Static("", markup=False, id="go-summary")
            yield Static("", markup=False, id="go-faults", classes="fault")

    def enter(self) -> None:
        """Show the run as it is now."""
        self.refresh_summary()
        self.query_one("#go-scroll").focus()

    def refresh_summary(self) -> None:
        """Draw the summary again, such as after the cheapest fix was applied."""
        wizard = self.wizard
        lines = summary(wizard.run, wizard.outlook, wizard.data_of_run(), wizard.command(), max(30, wizard.size.width - 6))
        self.query_one("#go-summary", Static).update(self.text(cells.stack(lines)))

    def say(self, news: str) -> None:
        """Show what is happening, in place of faults."""
        told = self.query_one("#go-faults", Static)
        told.update(self.text(Content.styled(news, cells.MAIN)))
        self.call_after_refresh(told.scroll_visible, animate=False)  # on 24 lines it lies beneath the summary

    def show_problems(self, problems: list[Problem]) -> None:
        """List what is wrong, all at once; nothing that was chosen is lost."""
        lines: list[Content] = []
        for problem in problems:
            where = f"{one_line(problem.where, limit=120)}: " if problem.where else ""
            lines.append(cells.assemble([("✖ ", cells.BAD), (where, "bold"), (one_line(problem.message, limit=600), cells.BAD)]))
            if problem.hint:
                lines.append(cells.assemble([("  " + one_line(problem.hint, limit=600), cells.DIM)]))
        faults = self.query_one("#go-faults", Static)
        faults.update(self.text(cells.stack(lines)))
        self.call_after_refresh(faults.scroll_visible, animate=False)


def summary(run: RunConfig, outlook: Outlook | None, look: DataLook | None, command: str, width: int = 74) -> list[Content]:
    """Return the lines of the summary."""
    planned = outlook.plan.run if outlook else run
    base = "16-bit base" if planned.method == "lora" else f"4-bit {planned.bnb_4bit_quant_type} base"
    known = look if look and look.rows and look.names == run.data else None
    trained, kept = used_rows(run, known.lengths, known.rows, known.measured_on, known.copies[0]) if known else (0, 0)
    if outlook and outlook.rows:
        trained, kept = outlook.rows, outlook.held
    rows = f"{trained:,} rows · " if trained else ""
    held = f"{units.percent(run.val_set_size)} held out" if run.val_set_size < 1 else f"{run.val_set_size:.0f} held out"
    held = f"{kept:,} held out to measure on" if kept else held
    if known and known.measured_on is not None:
        held = f"measured on {kept:,} rows of their own"
    if run.eval_data:
        held = f"measured on {one_line(run.eval_data, limit=80)}"
    steps = f"{outlook.steps:,} steps" if outlook and outlook.steps else f"{run.max_steps:,} steps" if run.max_steps else ""
    passes = f"{run.num_train_epochs:g} epochs" if not run.max_steps else ""
    size = f"{rows_per_step(run):,} rows a step ({rows_at_once(planned)} at once x {planned.gradient_accumulation_steps})"
    length = " · ".join(part for part in (steps, passes, size) if part)
    rate = f"learning rate {show('learning_rate', run.learning_rate)}, {run.lr_scheduler_type}"
    return [
        _line("model", [(one_line(run.model_name_or_path, limit=120), "bold"), (f" · {base}", "")]),
        _line("data", [(one_line(", ".join(run.data), limit=160), "bold"), (f" · {rows}{held}", "")]),
        _line("adapter", [(f"rank {run.lora_r}, alpha {run.lora_alpha}, on {', '.join(run.lora_target_modules)}", "")]),
        _line("training", [(length, "")]),
        _line("", [(f"up to {run.max_length:,} tokens a row · {rate}", "")]),
        *([_line("plan", [(_choices(outlook), "")])] if outlook and outlook.plan.choices else []),
        *[
            _line("note" if not index else "", [(one_line(told, limit=400), cells.WARN)])
            for index, told in enumerate(outlook.remarks if outlook else ())
        ],
        _line("saved in", [(one_line(run.runs_dir, limit=120) + "/", "")]),
        Content(" "),
        Content.styled(" The same without screens:", cells.DIM),
        *[Content.styled(f" {line}", cells.MAIN) for line in _shown(command, width)],
        Content(" "),
        Content.assemble((" enter ", "bold reverse"), (" starts the run", "bold")),
    ]


def _choices(outlook: Outlook) -> str:
    """Return what the planner decided, each in a word or two; "auto" stays in the config, this is what runs."""
    labels = {setting.name: setting.label for setting in (*MAIN, *MORE) if setting.name != "gradient_accumulation_steps"}
    return " · ".join(f"{labels[name]} {show(name, value)}" for name, value in outlook.plan.choices.items() if name in labels)


def _shown(command: str, width: int) -> list[str]:
    """Return the command in safe lines; cut before they are drawn and not before they are made, where a quote would stay open."""
    return [safe_text(line, limit=4000).replace("\n", "\\n") for line in on_lines(command, width)]


def _line(label: str, parts: list[Part]) -> Content:
    return cells.assemble([(f" {label:<{_LABEL}}", cells.DIM), *parts])


def begun(start: Callable[[RunConfig, Reading], Path], run: RunConfig, reading: Reading) -> tuple[Path | None, list[Problem]]:
    """Return the folder of the run that `start` began, or what is wrong; whatever it raises is told, and what was chosen stays."""
    try:
        return start(run, reading), []
    except ConfigErrors as error:
        return None, error.problems
    except EngineError as error:
        return None, [error.problem]
    except Exception as error:  # noqa: BLE001  a fault of ours must not take the choices with it
        return None, [Problem(type(error).__name__, redact(one_line(error)) or "no message", "this is a fault of the program")]
