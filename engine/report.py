"""`report.md`: what a run was, what it saw and what came of it, made from its journal, and from how the adapter it left describes itself.

Everything foreign (names, paths, data facts, errors) is escaped twice: control characters so that no terminal
obeys them, Markdown and HTML so that no viewer renders them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine import spent
from qlora_tui.engine.events import (
    Device,
    Evaluated,
    Event,
    Finding,
    Finished,
    Phase,
    Planned,
    Prepared,
    Record,
    Resumed,
    RolledBack,
    Saved,
    Started,
    Stepped,
)
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.rates import Change
from qlora_tui.engine.resume import rate_changes
from qlora_tui.engine.spec import KEYS
from qlora_tui.engine.text import one_line, redact
from qlora_tui.engine.units import count, gib, words

REPORT = "report.md"
_SHOWN_FINDINGS = 20
_PHASES = {"data": "judge answers", "probe": "rehearsal", "eval": "measure held-out rows"}
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!&~$])")


@dataclass(slots=True)
class Seen:
    """What a journal says about a run, with what a resume made void left out."""

    started: Started | None = None
    began: float = 0.0
    ended: float = 0.0
    attempts: int = 0
    prepared: Prepared | None = None
    planned: Planned | None = None
    steps: list[Stepped] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    device_peak_bytes: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    finished: Finished | None = None

    @property
    def scorecard(self) -> Evaluated | None:
        """Return the last comparison of base and tuned, if there was one."""
        return next((item for item in reversed(self.evaluations) if item.base_loss is not None), None)

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that this process was seen to hold."""
        return max((step.memory_peak_bytes for step in self.steps), default=0) or self.device_peak_bytes


def see(records: Iterable[Record]) -> Seen:
    """Fold a journal into what a report or a summary needs."""
    seen, told = Seen(), [*records]
    seen.changes = rate_changes(told)
    for record in told:
        seen.began = seen.began or record.t
        seen.ended = record.t
        seen.attempts = record.attempt
        _see_one(seen, record.event)
    return seen


def _see_one(seen: Seen, event: Event) -> None:
    match event:
        case Started():
            seen.started, seen.finished = event, None
        case Stepped() | Evaluated() | Saved() | Finding():
            _append(seen, event)
        case Phase(state="end", peak_bytes=int()):
            known = seen.phases.get(event.name)
            seen.phases[event.name] = event if known is None or (known.peak_bytes or 0) < (event.peak_bytes or 0) else known
        case Device():
            seen.device_peak_bytes = max(seen.device_peak_bytes, event.memory_ours_bytes or 0)
        case Resumed() | RolledBack():
            _cut(seen, event.to_step)
        case Prepared():
            seen.prepared = event
        case Planned():
            seen.planned = event
        case Finished():
            seen.finished = event


def _append(seen: Seen, event: Stepped | Evaluated | Saved | Finding) -> None:
    match event:
        case Stepped():
            seen.steps.append(event)
        case Evaluated():
            seen.evaluations.append(event)
        case Saved():
            seen.saved.append(event)
        case Finding():
            seen.findings.append(event)


def _cut(seen: Seen, step: int) -> None:
    """Forget what came after `step`: a resume went back to it, so it never happened to this adapter."""
    seen.steps = [item for item in seen.steps if item.step <= step]
    seen.evaluations = [item for item in seen.evaluations if item.step <= step]
    seen.findings = [item for item in seen.findings if item.step <= step]


def write(folder: Path, records: Iterable[Record], word: Finished | None = None) -> Path:
    """Write `report.md` into `folder` and return its path; `word` is the last word when it is not yet in the journal."""
    seen = see(records)
    seen.finished = word or seen.finished
    path = folder / REPORT
    replace_file(path, redact(render(seen, folder)))
    return path


def render(seen: Seen, folder: Path) -> str:
    """Return the report as Markdown."""
    parts = [
        [f"# {md(seen.started.run_id if seen.started else folder.name)}", *_outcome(seen)],
        _score(seen),
        _training(seen),
        _data(seen),
        _memory(seen),
        _titled("Cost", spent.section(folder)),
        _warnings(seen),
        _loading(seen, folder),
        _settings(seen),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def md(value: object) -> str:
    r"""Return `value` as one line that neither a terminal nor a Markdown viewer interprets.

    >>> md("<b>a_b</b>")
    '\\<b\\>a\\_b\\</b\\>'
    """
    return _MARKUP.sub(r"\\\1", one_line(value))


def _outcome(seen: Seen) -> Iterator[str]:
    yield ""
    word = seen.finished
    yield f"**{word.outcome}**: {md(word.reason)}" if word else "**not finished**: the journal has no last word."
    yield ""
    attempts = f" in {seen.attempts} attempts" if seen.attempts > 1 else ""
    yield f"It ran for {words(seen.ended - seen.began)}{attempts}, from the first event to the last."
    if seen.started:
        device = seen.started.device
        versions = ", ".join(f"{md(name)} {md(version)}" for name, version in seen.started.versions.items())
        yield f"On {md(device.get('name', 'an unknown device'))}. {versions}."


def _score(seen: Seen) -> list[str]:
    card = seen.scorecard
    if card is None or card.base_loss is None:
        return ["## Did it help?", "", "Not measured: base and tuned were not both evaluated on the held-out rows."]
    lines = ["## Did it help?", "", md(card.verdict), "", "| | nats a supervised token |", "|---|---|"]
    lines.append(f"| base | {card.base_loss:.4f} |")
    lines.append(f"| tuned, at step {card.step} | {card.loss:.4f} |")
    if card.drop is not None:
        lines.append(f"| drop, mean of rows | {card.drop:.4f} |")
    if card.interval is not None:
        lines.append(f"| 95 % interval of the drop | {card.interval[0]:.4f} to {card.interval[1]:.4f} |")
    share = f" {card.better_share:.0%} of them got better." if card.better_share is not None else ""
    lines += ["", f"Measured on {count(card.rows)} held-out rows that were never trained on.{share} Base and tuned losses weigh tokens;"]
    lines.append("the drop and its interval rest on row means, paired by row. Base is the model as loaded for training, adapter off.")
    return lines


def _training(seen: Seen) -> list[str]:
    if not seen.steps:
        return []
    first, last = seen.steps[0], seen.steps[-1]
    skipped = sum(step.skipped for step in seen.steps)
    busy = sum(step.seconds for step in seen.steps)
    tokens = sum(step.tokens for step in seen.steps)
    lines = ["## Training", "", f"- steps: {last.step} of {last.total_steps}, {last.epoch:.2f} epochs"]
    lines.append(f"- loss of a step: {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}")
    lines.append(f"- tokens: {count(tokens)}" + (f", {count(round(tokens / busy))} a second within steps" if busy else ""))
    if seen.changes:
        known = seen.started.config.get("learning_rate_changes", ()) if seen.started else ()
        texts = ", ".join(json.dumps(text) for text in (*known, *(change.text for change in seen.changes)))
        times = "once" if len(seen.changes) == 1 else f"{len(seen.changes)} times"
        lines.append(f"- the learning rate was changed {times} on the way; the same run again, with nobody at the keys:")
        lines += ["", "  ```", f"  qlora-tui --no-ui --config run.toml --set 'learning_rate_changes=[{texts}]'", "  ```", ""]
    if skipped:
        lines.append(f"- steps computed but not applied, because they were not finite: {skipped}")
    return lines


def _data(seen: Seen) -> list[str]:
    facts = seen.prepared
    if facts is None:
        return []
    lines = ["## Data", "", f"- format: {md(facts.why or facts.format)}"]
    lines.append(f"- rows: {count(facts.rows)} usable, {count(facts.train_rows)} trained on, {count(facts.holdout_rows)} held out")
    lines.append(f"- tokens an epoch: {count(facts.tokens)}, {count(facts.supervised_tokens)} of them trained")
    for title, missing in (("refused", facts.refused), ("dropped", facts.dropped)):
        lines += [f"- {title}: {count(number)} because {md(reason)}" for reason, number in missing.items()]
    lines += [f"- note: {md(note)}" for note in facts.notes]
    return lines


def _memory(seen: Seen) -> list[str]:
    predicted = seen.planned.budget.get("total_bytes") if seen.planned else None
    if not (predicted or seen.peak_bytes or seen.phases):
        return []
    lines = ["## Memory", ""]
    lines += [f"- predicted before loading: {gib(predicted)} (an estimate)"] if predicted else []
    lines += [f"- highest measured: {gib(seen.peak_bytes)}"] if seen.peak_bytes else []
    rows = [f"| {_PHASES.get(name, md(name))} | {_measured(phase)} |" for name, phase in seen.phases.items()]
    if rows:
        lines += ["", "| phase | predicted | measured | difference |", "|---|---|---|---|", *rows]
        lines += ["", "Measured is the most that the device held for this process in the phase, libraries included."]
    return lines


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    """Return plain lines as a section; none without lines."""
    return [f"## {title}", "", *(f"- {md(line)}" for line in lines)] if lines else []


def _measured(phase: Phase) -> str:
    found, predicted = phase.peak_bytes or 0, phase.predicted_bytes
    if not predicted:
        return f" | {gib(found)} | "
    return f"{gib(predicted)} | {gib(found)} | {found / predicted - 1:+.1%}"


def _warnings(seen: Seen) -> list[str]:
    found = [item for item in seen.findings if item.severity != "info"]
    if not found:
        return []
    lines = ["## Warnings", ""]
    for item in found[:_SHOWN_FINDINGS]:
        advice = f" Try: {'; '.join(md(text) for text in item.advice)}." if item.advice else ""
        lines.append(f"- step {item.step}, {md(item.detector)}: {md(item.message)}.{advice}")
    if len(found) > _SHOWN_FINDINGS:
        lines.append(f"- and {len(found) - _SHOWN_FINDINGS} more in events.jsonl")
    return lines


def _loading(seen: Seen, folder: Path) -> list[str]:
    if not seen.finished or not seen.finished.adapter or not seen.started:
        return []
    base = str(seen.started.config.get("model_name_or_path", ""))
    known = base if not base.startswith("builtin:") else "the folder named as base_model_name_or_path in adapter_config.json"
    adapter = _literal(str(folder.resolve() / seen.finished.adapter))
    lines = ["## Use the adapter", "", "```python"]
    if _sees(folder / seen.finished.adapter):
        lines += [
            "from peft import PeftConfig, PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoTokenizer",
            "",
            f"base = PeftConfig.from_pretrained({adapter}).base_model_name_or_path",
            f"model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), {adapter})",
        ]
    else:
        lines += [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f"model = AutoPeftModelForCausalLM.from_pretrained({adapter})",
        ]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({adapter})", "```", ""]
    lines.append(
        f"It needs its base model: {md(known)}. It was trained with method {md(seen.started.config.get('method', ''))}; loaded over a base"
    )
    lines.append("of another precision, its losses differ a little.")
    return lines


def _sees(adapter: Path) -> bool:
    """Say whether the adapter is for the text part of a model that also sees: `load` ties its targets to that part."""
    try:
        targets = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("target_modules")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(targets, str) and "language_model" in targets


def _settings(seen: Seen) -> list[str]:
    if not seen.started:
        return []
    lines = ["## Settings that differ from the defaults", "", "| key | value |", "|---|---|"]
    rows = _differing(seen.started.config)
    lines += [f"| {md(name)} | {md(_shown(value))} |" for name, value in rows]
    return [*lines, "", "All of them are in `run.toml`, which starts the same run again."]


def _differing(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        default = KEYS[name].default if name in KEYS else None
        if (tuple(value) if isinstance(value, list) else value) != default:
            yield name, value


def _shown(value: object) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _literal(text: str) -> str:
    """Return `text` as a Python literal in ASCII, so that a code block holds nothing but what it shows."""
    return ascii(text).replace("`", "\\x60")
