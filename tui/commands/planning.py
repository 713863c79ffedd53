"""What a run would need and what a dataset holds, as documents and as lines for people; no torch."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import builtin, data, hub, money, planner
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.data import Row, Tokenizer, load_tokenizer
from qlora_tui.engine.fixes import Fix, fixes, tips
from qlora_tui.engine.forecast import Before, Work, before_work
from qlora_tui.engine.lengthy import Shorter, remarks, shorter
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder
from qlora_tui.engine.planner import Plan
from qlora_tui.engine.spec import BUILTIN, RunConfig, changed, rows_per_step
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import billions, count, gib, words
from qlora_tui.tui.lengths import Lengths, guess, measure, triage_remark, used_rows
from qlora_tui.tui.probe import Probed
from qlora_tui.tui.reading import NOBODY, Reading

_SAMPLE_ROWS = 1000
_BAR = 30
_SHORT = {"model_name_or_path": "--model", "max_steps": "--max-steps", "runs_dir": "--runs-dir"}


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory and time of a run that has not started, both estimates, with the planner's choices made."""

    spec: ModelSpec
    plan: Plan
    fixes: tuple[Fix, ...]
    tips: tuple[Fix, ...]
    time: Before | None = None
    basis: str = ""
    remarks: tuple[str, ...] = ()
    shorter: tuple[Shorter, ...] = ()
    bill: money.Bill | None = None

    @property
    def budget(self) -> Budget:
        """Return the memory of the planned run."""
        return self.plan.budget

    def document(self, probed: Probed | None = None) -> dict[str, Any]:
        """Return what `budget --json` prints."""
        found = self.budget.to_json(fixes=self.fixes, time=self.time)
        found |= {
            "choices": dict(self.plan.choices),
            "reasons": dict(self.plan.reasons),
            "why": self.plan.why,
            "tips": [tip.to_json() for tip in self.tips],
        }
        found |= {"remarks": list(self.remarks), "shorter": [one.to_json() for one in self.shorter]}
        found["cost"] = self.bill.to_json() if self.bill else None
        return found | ({"probe": dataclasses.asdict(probed)} if probed else {})

    def lines(self) -> list[str]:
        """Return the same for people."""
        budget, run = self.budget, self.plan.run
        device = budget.machine
        verdict = "does NOT fit" if not budget.fits else "fits, but only just" if budget.tight else "fits"
        lines = [
            f"model   {one_line(self.spec.name)}, {billions(self.spec.params)} weights, {run.method} r{run.lora_r}",
            f"device  {one_line(device.name)}, {gib(device.total_bytes)}{_others(device)}",
            *([f"        {one_line(device.note)}"] if device.note else []),
            f"memory  {_bar(budget)} {gib(budget.total_bytes)} (± {gib(budget.margin_bytes)}, an estimate): {verdict}",
        ]
        lines += [f"        {gib(item.bytes):>9}  {item.name:<12} {one_line(item.how)}" for item in budget.items]
        lines.append("phases  " + ", ".join(f"{phase.name} {gib(phase.bytes)}" for phase in budget.phases))
        lines.append(f"plan    {one_line(self.plan.why)}")
        lines += [f"        {line}" for line in _chosen(self.plan)]
        if self.time is not None:
            low, middle, high = self.time.total_seconds
            lines.append(f"time    {words(middle)} ({words(low)} - {words(high)}), {words(self.time.step_seconds[1])} a step; {self.basis}")
            lines.append(f"        {one_line(self.time.basis)}")
        lines += [f"{'' if at else 'cost':<7} {one_line(line)}" for at, line in enumerate(money.lines(self.bill) if self.bill else ())]
        lines += [f"note    {one_line(remark)}" for remark in self.remarks]
        lines += [f"{'' if at else 'shorter':<7} {one.options}   {one_line(one.text)}" for at, one in enumerate(self.shorter)]
        shown, label = (self.tips, "faster") if budget.fits and not budget.tight else (self.fixes, "try")
        return lines + [f"{label if not index else '':<7} {fix.options}   {one_line(fix.text)}" for index, fix in enumerate(shown)]


def needs(
    run: RunConfig,
    spec: ModelSpec,
    device: Machine,
    rows: Sequence[Row] | None = None,
    measured: int | None = None,
    reading: Reading = NOBODY,
) -> Needs:
    """Plan `run` on `device`, and estimate memory and, where data are named, time; `measured` rows come with `rows` to be measured on."""
    broken: tuple[str, ...] = ()
    if rows is None and run.data:
        found_rows = data.load(run, lenient=True, progress=reading.progress)
        rows, broken = found_rows.rows, _broken(found_rows)
        held_apart = data.load_eval(run, lenient=True, progress=reading.progress)
        measured = len(held_apart.rows) if held_apart else None
    lengths = lengths_of(run, rows) if rows else Lengths()
    fitted = lengths.fitted(run)
    longest, mean = fitted.longest_trained(run.max_length), fitted.mean(run.max_length) or None
    plan = planner.choose(spec, run, device, longest=longest, mean=mean, lengths=fitted.tokens)
    found = tuple(fixes(spec, plan.run, device, longest=longest, lengths=lengths.tokens))
    room = tuple(tips(spec, plan.run, device, longest=longest, lengths=lengths.tokens))
    if not rows:
        return Needs(spec, plan, found, room, remarks=broken)
    work, basis = _work(plan.run, (len(rows), measured), lengths)
    time = before_work(spec, plan.run, device, work)
    told = remarks(spec, plan.run, device, time, longest=longest, longest_chat=lengths.longest_chat, asked=run, work=work)
    less, bill = tuple(shorter(spec, plan.run, device, time, work)), money.before_run(spec, run, device, time, work)
    return Needs(spec, plan, found, room, time, basis, (*broken, *told, *filter(None, [triage_remark(run)])), less, bill)


def _broken(found: data.Dataset) -> tuple[str, ...]:
    """Return what is said of rows that are in no figure, since a run would not train on them."""
    if not found.refused:
        return ()
    first, number = found.refused[0], len(found.refused)
    where = f"{first.source or 'the data'}{f', line {first.line}' if first.line else f', row {first.row}'}"
    rows = f"{count(number)} of {count(number + len(found.rows))} rows are broken and not counted here"
    return (f"{rows}; the first: {where}: {first.field}: {first.reason}; qlora-tui data lists them all",)


def lengths_of(run: RunConfig, rows: Sequence[Row]) -> Lengths:
    """Return how long the rows are: counted where the tokenizer is at hand, else guessed from characters."""
    return measure(rows, run, _SAMPLE_ROWS) or guess(rows, _SAMPLE_ROWS)


def _others(device: Machine) -> str:
    return f", in use now: {device.holders()}" if device.others_bytes else ""


def _chosen(plan: Plan) -> list[str]:
    """Return a line for each thing that was left to the planner: what it took, and why."""
    return [f"{name}={_typed(value)}  {one_line(plan.reasons.get(name, ''))}".rstrip() for name, value in plan.choices.items()]


def tokenizer_of(run: RunConfig, *, ask_hub: bool = False) -> Tokenizer | None:
    """Return the model's tokenizer where it lies on this machine, or also from the hub; None where it does not.

    Raises:
        EngineError: a hub or folder that was asked has none.
    """
    name = run.model_name_or_path
    if not name:
        return None
    if name == builtin.NAME:
        files = builtin.small_files()
        return load_tokenizer(files.folder, run.chat_template) if files.complete else None
    if is_folder(name):
        return load_tokenizer(Path(name).expanduser(), run.chat_template)
    if not ask_hub or name.startswith(BUILTIN):
        return None
    return load_tokenizer(hub.small_files(name, run.revision).folder, run.chat_template)


def _work(run: RunConfig, rows: tuple[int, int | None], lengths: Lengths) -> tuple[Work, str]:
    """Return the work of a run and what it rests on, from the rows looked at; `rows` is how many there are, and how many to measure on."""
    trained, held = used_rows(run, lengths, *rows)
    lengths = lengths.fitted(run)
    each = lengths.mean(run.max_length) or run.max_length
    an_epoch = math.ceil(trained / rows_per_step(run))
    steps = run.max_steps or max(1, math.ceil(run.num_train_epochs * an_epoch))
    how = f"of {count(len(lengths.tokens))} looked at" if lengths.measured else "guessed from characters"
    work = Work(round(each * trained), steps, an_epoch, round(each * held), lengths.tokens, trained, held)
    return work, f"{count(steps)} steps, about {each:.0f} tokens a row ({how})"


def _bar(budget: Budget) -> str:
    total = max(budget.machine.total_bytes, 1)
    ours, others = (min(_BAR, round(part / total * _BAR)) for part in (budget.total_bytes, budget.machine.others_bytes))
    return f"[{'#' * ours}{'x' * min(others, _BAR - ours)}{'.' * max(0, _BAR - ours - others)}]"


def command_of(run: RunConfig) -> str:
    """Return the command that starts `run` again without a screen."""
    parts = ["qlora-tui", "--no-ui"]
    for name, value in changed(run).items():
        if name == "data" and isinstance(value, tuple):
            parts += [part for path in value for part in ("--data", shlex.quote(path))]
        elif name == "skip_bad_rows":
            parts.append("--skip-bad-rows")
        elif name in _SHORT:
            parts += [_SHORT[name], shlex.quote(str(value))]
        else:
            parts += ["--set", shlex.quote(f"{name}={_typed(value)}")]
    return " ".join(parts)


def _typed(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ",".join(value) if isinstance(value, tuple) else str(value)
