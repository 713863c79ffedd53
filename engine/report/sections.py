"""The sections of a report, in the order in which people ask: did it help, what was done, on what, for how much, how to use it."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine.events import Evaluated, Finding, Phase, Probed
from qlora_tui.engine.report import after, cost
from qlora_tui.engine.report.blocks import Bars, Block, Code, Curves, Figure, Figures, Line, Points, Quote, Section, Table, Text, Tone
from qlora_tui.engine.report.seen import Seen
from qlora_tui.engine.score import IMPROVEMENT_NATS
from qlora_tui.engine.spec import KEYS
from qlora_tui.engine.units import count, gib, percent, words

_SHOWN_FINDINGS, _SHOWN_SAMPLES, _SHOWN_EVALUATIONS = 20, 6, 12
_PHASES = {"data": "judge answers", "probe": "rehearsal", "eval": "measure held-out rows"}
_CHECKED = {"general": "general text", "train": "rows trained on", "other_question": "held-out answers after other questions"}
_NAMED = {"forgetting", "overfitted", "overfitting", "manner"}
_EMA = 0.9
_PLANNED = (
    ("model_name_or_path", "base"),
    ("method", "method"),
    ("lora_r", "rank"),
    ("lora_alpha", "alpha"),
    ("max_length", "longest row, tokens"),
    ("per_device_train_batch_size", "rows at once"),
    ("gradient_accumulation_steps", "batches a step"),
    ("learning_rate", "learning rate"),
    ("lr_scheduler_type", "schedule"),
    ("seed", "seed"),
)


def all_sections(seen: Seen, folder: Path) -> list[Section]:
    """Return everything that can be said of the run in `folder`; a section without anything to say is left out."""
    made = [Section(title, list(tell(seen, folder))) for title, tell in _SECTIONS]
    return [section for section in made if section.blocks]


def outcome(seen: Seen) -> tuple[Text, Text]:
    """Return how the run ended, and how long and on what it ran."""
    word = seen.finished
    tones: Mapping[str, Tone] = {"done": "good", "stopped": "warn", "aborted": "warn"}
    ended = f"{word.outcome}: {word.reason}" if word else "not finished: the journal has no last word."
    attempts = f" in {seen.attempts} attempts" if seen.attempts > 1 else ""
    told = f"It ran for {words(seen.ended - seen.began)}{attempts}, from the first event to the last"
    device = f", on {seen.started.device.get('name', 'an unknown device')}" if seen.started else ""
    return Text(ended, strong=True, tone=tones.get(word.outcome, "bad") if word else "warn"), Text(f"{told}{device}.")


def _score(seen: Seen, folder: Path) -> Iterator[Block]:
    card = seen.scorecard
    if card is None or card.base_loss is None:
        yield Text("Not measured: base and tuned were not both evaluated on the held-out rows.")
        return
    yield Text(card.verdict, strong=True, tone=tone_of(card))
    yield Figures([*_large(card)])
    rows = [["base", f"{card.base_loss:.4f}"], [f"tuned, at step {card.step}", f"{card.loss:.4f}"]]
    rows += [["drop, mean of rows", f"{card.drop:.4f}"]] if card.drop is not None else []
    rows += [["95 % interval of the drop", f"{card.interval[0]:.4f} to {card.interval[1]:.4f}"]] if card.interval else []
    yield Table(["", "nats a supervised token"], rows)
    share = f" {percent(card.better_share)} of them got better." if card.better_share is not None else ""
    yield Text(
        f"Measured on {count(card.rows)} held-out rows that were never trained on.{share} Base and tuned losses weigh tokens; the drop and "
        "its interval rest on row means, paired by row. Base is the model as loaded for training, adapter off. A measurable improvement "
        f"is a drop of at least {IMPROVEMENT_NATS} nats with the whole interval above zero, and not one of manner alone."
    )
    if drops := _drops(folder, card):
        yield Bars("What each held-out row gained, best first", drops, "nats a token")
    yield from _regressions(card)
    yield from _checks(seen)


def tone_of(card: Evaluated) -> Tone:
    """Return the colour of a verdict: good only where the drop is large, its interval above zero, and it is not one of manner alone."""
    if card.interval is None or card.drop is None:
        return ""
    sure = card.interval[0] > 0 and card.drop >= IMPROVEMENT_NATS and not card.manner
    return "good" if sure else "bad" if card.interval[1] < 0 else "warn"


def _large(card: Evaluated) -> Iterator[Figure]:
    if card.drop is not None:
        sure = f"{card.interval[0]:+.2f} to {card.interval[1]:+.2f}, 95 %" if card.interval else "mean row"
        yield Figure(f"{card.drop:+.2f}", f"nats a token gained ({sure})", tone_of(card))
    yield Figure(f"{card.base_loss:.2f} → {card.loss:.2f}", "held-out loss, base to tuned")
    if card.better_share is not None:
        yield Figure(percent(card.better_share), f"of {count(card.rows)} held-out rows got better")


def _drops(folder: Path, card: Evaluated) -> list[float]:
    """Return what each row gained, largest first; nothing where the rows' losses are not in the folder."""
    try:
        known = [_means(folder / "eval" / name) for name in ("base.jsonl", f"step-{card.step:06d}.jsonl")]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return []
    if [row for row, _ in known[0]] != [row for row, _ in known[1]]:
        return []
    return sorted((before - after for (_, before), (_, after) in zip(*known, strict=True)), reverse=True)


def _means(path: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["row"], float(row["nll"]) / row["tokens"]) for row in rows]


def _regressions(card: Evaluated) -> Iterator[Block]:
    told = [row for row in card.worst if _is_figure(row.get("base_loss")) and _is_figure(row.get("loss"))]
    if not told:
        yield Text("No held-out row got worse." if card.better_share == 1 else "No row that got worse is told.")
        return
    yield Text(f"The {'row' if len(told) == 1 else f'{len(told)} rows'} that lost most, to read:")
    for row in told:
        title = f"row {row.get('row', '')}: {row['base_loss']:.2f} → {row['loss']:.2f} nats a token"
        yield Quote(title, [(name, str(row[key])) for key, name in (("prompt", "asks"), ("answer", "answer")) if row.get(key)], "warn")


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _checks(seen: Seen) -> Iterator[Block]:
    """Tell what was measured beside the hold-out, and what was found in it."""
    if seen.probes:
        yield Table(["checked at the end", "base", "tuned", "drop (95 % interval)"], [_checked(probed) for probed in seen.probes.values()])
        yield Points([f"{_CHECKED.get(name, name)}: {probed.about}, {count(probed.tokens)} tokens" for name, probed in seen.probes.items()])
    yield from _own_question(seen)
    for found in seen.findings:
        if found.detector in _NAMED and found.severity != "info":
            named = "" if found.message.startswith(found.detector) else f"{found.detector}: "
            yield Text(f"{named}{found.message}", strong=True, tone="warn")


def _own_question(seen: Seen) -> Iterator[Block]:
    """Say what the own question counts where that is sure; where it is not, or next to nothing, a finding says so."""
    probed = seen.probes.get("other_question")
    if probed is None or probed.own_more is None or probed.own_interval is None or any(one.detector == "manner" for one in seen.findings):
        return
    if not probed.own_interval[0] > 0:
        return
    low, high = probed.own_interval
    yield Text(
        f"After their own question these answers gained {probed.own_more:.2f} nats a token more than after another row's "
        f"({low:.2f} to {high:.2f}): that much was learned of what they say, and not of their manner alone."
    )


def _checked(probed: Probed) -> list[str]:
    interval = f"{probed.interval[0]:+.4f} to {probed.interval[1]:+.4f}"
    return [_CHECKED.get(probed.name, probed.name), f"{probed.base_loss:.4f}", f"{probed.loss:.4f}", f"{probed.drop:+.4f} ({interval})"]


def _plan(seen: Seen, folder: Path) -> Iterator[Block]:
    if not seen.started:
        return
    config = {**seen.started.config, **(seen.planned.choices if seen.planned else {})}
    yield Table(["what", "value"], [[name, shown(config[key])] for key, name in _PLANNED if key in config], figures=False)
    if seen.planned:
        known = {key for key, _ in _PLANNED}
        chosen = ", ".join(f"{name} = {shown(value)}" for name, value in seen.planned.choices.items() if name not in known)
        yield Points([text for text in (seen.planned.why, f"chosen for you: {chosen}" if chosen else "") if text])


def _training(seen: Seen, folder: Path) -> Iterator[Block]:
    if not seen.steps:
        return
    first, last = seen.steps[0], seen.steps[-1]
    skipped, busy = sum(step.skipped for step in seen.steps), sum(step.seconds for step in seen.steps)
    tokens = sum(step.tokens for step in seen.steps)
    facts = [f"steps: {last.step} of {last.total_steps}, {last.epoch:.2f} epochs"]
    facts.append(f"loss of a step: {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}")
    facts.append(f"tokens: {count(tokens)}" + (f", {count(round(tokens / busy))} a second within steps" if busy else ""))
    facts += [f"steps computed but not applied, because they were not finite: {skipped}"] if skipped else []
    yield Points(facts)
    yield from _curves(seen)
    measured = [item for item in seen.evaluations if math.isfinite(item.loss)]
    if len(measured) > 1:
        apart = max(1, -(-len(measured) // _SHOWN_EVALUATIONS))
        chosen = [*measured[:-1:apart], measured[-1]]
        yield Table(["measured after step", "held-out loss"], [[str(item.step), f"{item.loss:.4f}"] for item in chosen])
    yield from _changed(seen)


def _curves(seen: Seen) -> Iterator[Block]:
    losses = [(float(step.step), step.loss) for step in seen.steps]
    held = [(float(item.step), item.loss) for item in seen.evaluations]
    lines = [Line("loss of a step", losses, "faint"), Line(f"its average (EMA {_EMA:g})", _smooth(losses)), Line("held-out", held, "marks")]
    base = next((item.loss for item in seen.evaluations if item.step == 0), None)
    lines += [Line("base, held-out", [(0.0, base), (losses[-1][0], base)], "level")] if base is not None else []
    yield Curves("Loss", lines, "nats a token")
    yield Curves("Learning rate", [Line("", [(float(step.step), step.lr) for step in seen.steps])], wide=False)
    yield Curves("Gradient norm", [Line("", [(float(step.step), step.grad_norm) for step in seen.steps])], wide=False)


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    average = start = statistics.fmean(finite[:8]) if (finite := [y for _, y in points if math.isfinite(y)]) else math.nan
    for x, y in points:
        average = _EMA * average + (1 - _EMA) * y if math.isfinite(y) else average
        found.append((x, average))
    return found if math.isfinite(start) else []


def _changed(seen: Seen) -> Iterator[Block]:
    if not seen.changes:
        return
    times = "once" if len(seen.changes) == 1 else f"{len(seen.changes)} times"
    yield Text(f"The learning rate was changed {times} on the way; the command at the end of this report makes the same changes.")


def _data(seen: Seen, folder: Path) -> Iterator[Block]:
    facts = seen.prepared
    if facts is None:
        return
    lines = [f"format: {facts.why or facts.format}"]
    lines.append(f"rows: {count(facts.rows)} usable, {count(facts.train_rows)} trained on, {count(facts.holdout_rows)} held out")
    lines.append(f"tokens an epoch: {count(facts.tokens)}, {count(facts.supervised_tokens)} of them trained")
    for title, missing in (("refused", facts.refused), ("dropped", facts.dropped)):
        lines += [f"{title}: {count(number)} because {reason}" for reason, number in missing.items()]
    yield Points([*lines, *(f"note: {note}" for note in facts.notes)])


def _memory(seen: Seen, folder: Path) -> Iterator[Block]:
    predicted = seen.planned.budget.get("total_bytes") if seen.planned else None
    if not (predicted or seen.peak_bytes or seen.phases):
        return
    facts = [f"predicted before loading: {gib(predicted)} (an estimate)"] if predicted else []
    yield Points(facts + ([f"highest measured: {gib(seen.peak_bytes)}"] if seen.peak_bytes else []))
    if rows := [[_PHASES.get(name, name), *_measured(phase)] for name, phase in seen.phases.items()]:
        yield Table(["phase", "predicted", "measured", "difference"], rows)
        yield Text("Measured is the most that the device held for this process in the phase, libraries included.")


def _measured(phase: Phase) -> list[str]:
    found, predicted = phase.peak_bytes or 0, phase.predicted_bytes
    return [gib(predicted), gib(found), f"{found / predicted - 1:+.1%}"] if predicted else ["", gib(found), ""]


def _warnings(seen: Seen, folder: Path) -> Iterator[Block]:
    found = [item for item in seen.findings if item.severity != "info"]
    if not found:
        return
    yield Points(
        [
            *(_warning(item) for item in found[:_SHOWN_FINDINGS]),
            *([f"and {len(found) - _SHOWN_FINDINGS} more in events.jsonl"] if len(found) > _SHOWN_FINDINGS else []),
        ]
    )


def _warning(item: Finding) -> str:
    advice = f" Try: {'; '.join(item.advice)}." if item.advice else ""
    return f"step {item.step}, {item.detector}: {item.message}.{advice}"


def _samples(seen: Seen, folder: Path) -> Iterator[Block]:
    """Show what the model answered last, and first where that was another answer, to each prompt."""
    for prompt in list(dict.fromkeys(item.prompt for item in seen.samples))[-_SHOWN_SAMPLES:]:
        answers = [item for item in seen.samples if item.prompt == prompt]
        told = [("asked", prompt)]
        if len(answers) > 1 and answers[0].text != answers[-1].text:
            told.append((f"after step {answers[0].step}", answers[0].text or "(nothing)"))
        yield Quote("", [*told, (f"after step {answers[-1].step}", answers[-1].text or "(nothing)")])


def _cost(seen: Seen, folder: Path) -> Iterator[Block]:
    if told := cost.lines(seen):
        yield Points(told)


def _loading(seen: Seen, folder: Path) -> Iterator[Block]:
    if not seen.finished or not seen.finished.adapter or not seen.started:
        return
    base = str(seen.started.config.get("model_name_or_path", ""))
    known = base if not base.startswith("builtin:") else "the folder named as base_model_name_or_path in adapter_config.json"
    adapter = literal(str(folder.resolve() / seen.finished.adapter))
    lines = [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f"model = AutoPeftModelForCausalLM.from_pretrained({adapter})",
    ]
    if _sees(folder / seen.finished.adapter):
        lines = [
            "from peft import PeftConfig, PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoTokenizer",
            "",
            f"base = PeftConfig.from_pretrained({adapter}).base_model_name_or_path",
            f"model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), {adapter})",
        ]
    yield Code([*lines, f"tokenizer = AutoTokenizer.from_pretrained({adapter})"], "python")
    method = seen.started.config.get("method", "")
    yield Text(
        f"It needs its base model: {known}. It was trained with method {method}; loaded over a base of another precision, its losses "
        "differ a little."
    )


def _sees(adapter: Path) -> bool:
    """Say whether the adapter is for the text part of a model that also sees: `load` ties its targets to that part."""
    try:
        targets = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("target_modules")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(targets, str) and "language_model" in targets


def _again(seen: Seen, folder: Path) -> Iterator[Block]:
    """Say how the same run starts once more, nobody at the keys, and on what it ran."""
    if not seen.started:
        return
    command = "qlora-tui --no-ui --config run.toml"
    if seen.changes:
        known = seen.started.config.get("learning_rate_changes", ())
        texts = ", ".join(json.dumps(text) for text in (*known, *(change.text for change in seen.changes)))
        command += f" --set {shlex.quote(f'learning_rate_changes=[{texts}]')}"
    yield Code([command])
    yield Text("In this folder: run.toml holds every setting. The same versions on the same device give the same adapter.")
    yield Table(["package", "version"], [[name, version] for name, version in seen.started.versions.items()], figures=False)


def _settings(seen: Seen, folder: Path) -> Iterator[Block]:
    if seen.started:
        rows = [[name, shown(value)] for name, value in _differing(seen.started.config)]
        yield Table(["key", "value"], rows, figures=False)


def _differing(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        default = KEYS[name].default if name in KEYS else None
        if (tuple(value) if isinstance(value, list) else value) != default:
            yield name, value


def shown(value: object) -> str:
    """Return a setting's value as people read it."""
    return ", ".join(str(part) for part in value) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def literal(text: str) -> str:
    """Return `text` as a Python literal in ASCII, so that a code block holds nothing but what it shows."""
    return ascii(text).replace("`", "\\x60")


_SECTIONS: tuple[tuple[str, Callable[[Seen, Path], Iterator[Block]]], ...] = (
    ("Did it help?", _score),
    ("Which answers are better?", after.judged),
    ("Plan", _plan),
    ("Training", _training),
    ("Data", _data),
    ("Memory", _memory),
    ("Warnings", _warnings),
    ("Samples", _samples),
    ("Cost", _cost),
    ("Exports", after.exports),
    ("Use the adapter", _loading),
    ("The same run again", _again),
    ("Settings that differ from the defaults", _settings),
)
"""Title and maker of each section, in their order."""
