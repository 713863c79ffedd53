"""The last page: what will run, in words and as a command, and the key that starts it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.engine import units
from qlora_tui.engine.errors import ConfigErrors, EngineError, Problem
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.runs import slug
from qlora_tui.engine.spec import RunConfig, rows_at_once, rows_per_step
from qlora_tui.engine.text import one_line, safe_text, without_secrets
from qlora_tui.tui import words
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import used_rows
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import parts_of
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens.command import on_lines
from qlora_tui.tui.screens.desk import Outlook
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.settings import MAIN, MORE, show

_LABEL = 12
_SHOWN = 3
_COMMAND = " The same without screens (c copies it):"
_LONG_COMMAND = " The same without screens: under the plan; c copies it"


class GoPage(Page):
    """A summary to read once, and Enter to start."""

    title = "go"
    place = "go page"

    def compose(self) -> ComposeResult:
        """Lay out the summary and the place for faults."""
        with VerticalScroll(id="go-scroll"):
            yield Static("", markup=False, id="go-summary")
        with VerticalScroll(can_focus=False, id="go-news"):
            yield Static("", markup=False, id="go-faults", classes="fault")
        yield Static("", markup=False, id="go-command")
        told = Content.assemble((" enter ", "bold reverse"), (" starts the run", "bold"), ("   e queues it", cells.DIM))
        yield Static(self.text(told), markup=False, id="go-enter")

    def enter(self) -> None:
        """Show the run as it is now."""
        self.refresh_run()
        self.query_one("#go-scroll").focus()

    def refresh_run(self, *, anew: bool = False) -> None:
        """Draw the summary again, such as after a change was taken or given back."""
        wizard = self.wizard
        spec, width = wizard.desk.model(wizard.run), max(30, wizard.size.width - 6)
        checkpoint = wizard.desk.checkpoint_bytes(wizard.run)
        bill = wizard.desk.bill(wizard.run, wizard.outlook)
        lines = summary(wizard.run, wizard.outlook, wizard.data_of_run(), wizard.command(), width, spec, checkpoint, bill)
        self.query_one("#go-summary", Static).update(self.text(cells.stack(lines)))
        self.query_one("#go-command", Static).update(self.text(cells.stack(command_lines(wizard.command(), width))))

    def say(self, news: str) -> None:
        """Show what is happening, in place of faults."""
        told = self.query_one("#go-faults", Static)
        told.update(self.text(Content.styled(news, cells.MAIN)))

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


def summary(
    run: RunConfig,
    outlook: Outlook | None,
    look: DataLook | None,
    command: str,
    width: int = 74,
    spec: ModelSpec | None = None,
    checkpoint: int = 0,
    bill: str = "",
) -> list[Content]:
    """Return the lines of the summary: what runs, on what, what it needs and takes, where it goes, and what watches over it.

    `checkpoint` is about the bytes of one; 0: not known. `bill` is what the run costs.
    """
    planned = outlook.plan.run if outlook else run
    bits = {"lora": "16-bit base", "lora-8bit": "8-bit base"}
    base = bits.get(planned.method, f"4-bit {planned.bnb_4bit_quant_type} base")
    size = f" · {units.billions(spec.params)} weights" if spec else ""
    rows, held = _rows(run, outlook, look)
    facts = [
        ("model", f"{one_line(run.model_name_or_path, limit=120)}{size} · {base}"),
        ("data", f"{one_line(', '.join(run.data), limit=160)} · {rows}{held}"),
        ("adapter", f"rank {run.lora_r}, alpha {run.lora_alpha}, on {', '.join(run.lora_target_modules)} · {_rate(run)}"),
        ("training", f"{_length(run, planned, outlook)} · {run.max_length:,} tokens a row at most"),
        *([("plan", _choices(outlook))] if outlook and outlook.plan.choices else []),
        *([("memory", _memory(outlook))] if outlook else []),
        *([("time", _time(outlook))] if outlook else []),
        *(("" if at else "cost", part) for at, part in enumerate(one_line(bill, limit=400).split("; ", 1)) if part),
        ("checkpoints", _checkpoints(run, checkpoint)),
        ("saved in", f"{one_line(run.runs_dir, limit=120)}/DATE-TIME-{slug(run.model_name_or_path)}/"),
        ("watch", _watch(run)),
    ]
    lines = [line for label, text in facts for line in _wrapped(label, text, "", width)]
    for told in outlook.remarks if outlook else ():
        lines += _wrapped("note", one_line(told, limit=400), cells.WARN, width)
    written = _written(command, width)
    return [
        *lines,
        *([Content(" "), Content.styled(_COMMAND, cells.DIM), *written] if len(written) > _SHOWN else []),
    ]


def command_lines(command: str, width: int) -> list[Content]:
    """Return the command that does the same, to stay in sight; one that is too long for that stands whole under the plan."""
    written = _written(command, width)
    if len(written) <= _SHOWN:
        return [Content.styled(_COMMAND, cells.DIM), *written]
    return [Content.styled(_LONG_COMMAND, cells.DIM)]


def _written(command: str, width: int) -> list[Content]:
    """Return the command in safe lines; cut before they are drawn and not before they are made, where a quote would stay open."""
    shown = [safe_text(line, limit=4000).replace("\n", "\\n") for line in on_lines(command, width)]
    return [Content.styled(f" {line}", cells.MAIN) for line in shown]


def _rows(run: RunConfig, outlook: Outlook | None, look: DataLook | None) -> tuple[str, str]:
    """Return how many rows are trained on, and how many are measured."""
    known = look if look and look.rows and look.names == run.data else None
    trained, kept = used_rows(run, known.lengths, known.rows, known.measured_on, known.copies[0]) if known else (0, 0)
    if outlook and outlook.rows:
        trained, kept = outlook.rows, outlook.held
    rows = f"{trained:,} rows · " if trained else ""
    held = f"{units.percent(run.val_set_size)} held out" if run.val_set_size < 1 else f"{run.val_set_size:.0f} held out"
    held = f"{kept:,} held out to measure" if kept else held
    if known and known.measured_on is not None:
        held = f"measured on {kept:,} rows of their own"
    return rows, f"measured on {one_line(run.eval_data, limit=80)}" if run.eval_data else held


def _length(run: RunConfig, planned: RunConfig, outlook: Outlook | None) -> str:
    steps = f"{outlook.steps:,} steps" if outlook and outlook.steps else f"{run.max_steps:,} steps" if run.max_steps else ""
    passes = f"{run.num_train_epochs:g} epochs" if not run.max_steps else ""
    size = f"{rows_per_step(run):,} rows a step ({rows_at_once(planned)} x {planned.gradient_accumulation_steps})"
    return " · ".join(part for part in (steps, passes, size) if part)


def _rate(run: RunConfig) -> str:
    return f"learning rate {show('learning_rate', run.learning_rate)}, {run.lr_scheduler_type}"


def _memory(outlook: Outlook) -> str:
    """Return the whole, and each part of it that counts."""
    budget = outlook.budget
    parts = ", ".join(f"{label} {words.gib(amount, unit=False)}" for label, amount in parts_of(budget))
    margin = words.gib(budget.margin_bytes, unit=False)
    return f"{words.gib(budget.total_bytes, unit=False)} of {words.gib(budget.machine.total_bytes)} (± {margin}): {parts}"


def _time(outlook: Outlook) -> str:
    time = outlook.time or outlook.typical
    if time is None:
        return "no estimate for this device"
    low, mid, high = time.total_seconds
    rows = "" if outlook.time else f" for {outlook.assumed}"
    return f"{words.duration(mid)} ({words.span(low, high)}){rows}, an {time.basis.split(';')[0]}"


def _checkpoints(run: RunConfig, each: int) -> str:
    """Return how often one is written, how many are kept, and the disk they take."""
    often = f"every {run.save_steps:,} steps" if run.save_steps else "about ten times a run"
    kept = f"the newest {run.save_total_limit}, the best and the last healthy one stay"
    disk = f", up to {words.size(each * (run.save_total_limit + 2))} of disk" if each else ""
    return f"{often}; {kept}{disk}"


def _watch(run: RunConfig) -> str:
    """Return what the watch would do by itself."""

    def named(names: Sequence[str]) -> str:
        return ", ".join(name.replace("_", " ") for name in names)

    stops = named([name for name in run.watch_stop if name != "non_finite"])
    back = f"; goes back to a healthy checkpoint on {named(run.watch_rollback)}" if run.watch_rollback else ""
    return f"stops with a checkpoint on numbers that are not finite{', ' if stops else ''}{stops}{back}; tells of all else"


def _choices(outlook: Outlook) -> str:
    """Return what the planner decided, each in a word or two; "auto" stays in the config, this is what runs."""
    labels = {setting.name: setting.label for setting in (*MAIN, *MORE) if setting.name != "gradient_accumulation_steps"}
    return " · ".join(f"{labels[name]} {show(name, value)}" for name, value in outlook.plan.choices.items() if name in labels)


def _wrapped(label: str, text: str, style: str, width: int) -> list[Content]:
    """Return a fact under its label on as many lines as it takes; what stands first is the fact itself."""
    lines = textwrap.wrap(text, max(20, width - _LABEL - 1))
    return [cells.assemble([(f" {'' if at else label:<{_LABEL}}", cells.DIM), (line, style)]) for at, line in enumerate(lines)]


def begun(start: Callable[[RunConfig, Reading], Path], run: RunConfig, reading: Reading) -> tuple[Path | None, list[Problem]]:
    """Return the folder of the run that `start` began, or what is wrong; whatever it raises is told, and what was chosen stays."""
    try:
        return start(run, reading), []
    except ConfigErrors as error:
        return None, error.problems
    except EngineError as error:
        return None, [error.problem]
    except Exception as error:  # noqa: BLE001  a fault of ours must not take the choices with it
        return None, [Problem(type(error).__name__, without_secrets(error) or "no message", "this is a fault of the program")]
