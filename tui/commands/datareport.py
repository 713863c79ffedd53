"""What a dataset holds, as lines for people: `qlora-tui data`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_tui.engine.budget import Budget, estimate
from qlora_tui.engine.data.perplexity import share_for
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.forecast import Before, before
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.planner import choose
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, safe_text
from qlora_tui.engine.units import count, percent, words
from qlora_tui.tui.lengths import cost_words, limit_words, multiple, share

_BAR = 30
_REFUSED_SHOWN = 20
_TRAINED, _SPECIAL, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def data_lines(
    found: Mapping[str, Any], *, cost: str = "", too_long: str = "", time: Before | None = None, colour: bool = False
) -> list[str]:
    """Return the facts about a dataset for people; every text of its own is escaped.

    Args:
        found: what `describe` returned.
        cost: what the limit that keeps 99 % whole costs, as `limit_cost` says it.
        too_long: what the run does with rows over its limit.
        time: how long the run takes, where that can be said.
        colour: whether trained tokens of the examples are coloured, on top of their mark.
    """
    lines = [f"format     {one_line(found['format'] or 'none')} ({one_line(found['why'])})"]
    lines.append(f"rows       {count(found['rows'])}, {count(found['usable'])} usable, {count(len(found['refused']))} refused")
    lines.append(f"turns      {_turns(found)}")
    if tokens := found["tokens"]:
        lines.append(f"tokens     {count(tokens['total'])}, {count(tokens['supervised'])} trained ({_share(tokens)})")
        lines.append(f"a row      {tokens['p50']} at the median, {tokens['p95']} at 95 %, {tokens['p99']} at 99 %, {tokens['max']} at most")
        lines += _histogram_lines(found["histogram"])
        long = found["too_long"]
        lines.append(f"too long   {_rows(long['rows'])}, {count(long['answer_lost'])} of them with no answer inside the limit")
        lines += _limit_lines(found["limits"], cost, too_long)
    copies, held = found["duplicates"], found["holdout"]
    lines.append(f"duplicates {count(copies['exact'])} exact, {count(copies['near'])} near")
    leaks = (
        f"{count(held['leaks'])} more are also in the training rows and not measured"
        if held["leaks"]
        else "none of them in the training rows"
    )
    lines.append(f"held out   {_rows(held['rows'])}, {leaks}")
    if found["prepared"]:
        lines.append(_prepared_line(found["prepared"]))
    if time is not None:
        low, middle, high = time.total_seconds
        lines.append(f"time       {words(middle)} ({words(low)} - {words(high)}), {one_line(time.basis)}")
    for each in found["boilerplate"]:
        where = f"in {count(each['rows'])} rows ({share(each['share'])}), {each['role']}"
        lines.append(f"repeated   {where}: {one_line(each['text'], limit=160)}")
    if "perplexity" in found:
        lines += _perplexity_lines(found["perplexity"])
    lines += [f"note       {one_line(note)}" for note in found.get("notes", ())]
    lines += _refused_lines(found["refused"])
    for example in found.get("examples", ()):
        lines += _example_lines(example, colour=colour)
    return lines


def _refused_lines(refused: Sequence[Mapping[str, Any]]) -> list[str]:
    """List refused rows with their reasons; rows one after the other that share theirs are told together."""
    lines: list[str] = []
    told = 0
    alike = itertools.groupby(enumerate(refused), lambda each: (each[1]["field"], each[1]["reason"], each[1]["row"] - each[0]))
    for (field, reason, _), found in itertools.islice(alike, _REFUSED_SHOWN):
        faults = [fault for _, fault in found]
        told += len(faults)
        first, last = faults[0], faults[-1]
        many = "s" if len(faults) > 1 else ""
        rows, place = ([f"{fault[name]}" for fault in (first, last) if fault.get(name)] for name in ("row", "line"))
        told_rows = f"row{many} {' to '.join(dict.fromkeys(rows))}"
        told_lines = f", line{many} {' to '.join(dict.fromkeys(place))}" if place else ""
        where = f"{one_line(field)}: " if field else ""
        lines.append(f"refused    {told_rows}{told_lines}: {where}{one_line(reason)}")
    if told < len(refused):
        lines.append(f"           and {count(len(refused) - told)} more (--json lists all)")
    return lines


def _histogram_lines(bins: Sequence[Mapping[str, int]]) -> list[str]:
    most = max((each["rows"] for each in bins), default=0)
    lines = []
    for each in bins:
        bar = "#" * -(-each["rows"] * _BAR // max(1, most))
        lines.append(f"           {count(each['low']):>7} - {count(each['high']):<7} {bar:<{_BAR}} {count(each['rows'])}")
    return lines


def _limit_lines(limits: Mapping[str, Any], cost: str, too_long: str) -> list[str]:
    """Say what each limit would do to the rows, where it does anything; the run's own limit also says what would be enough."""
    own, *others = sorted(limits["lengths"], key=lambda each: each["max_length"] != limits["max_length"])
    if not own["longer"]:
        return []
    told = [limit_words(own["max_length"], own["longer"], own["answer_lost"], multiple(limits["keeps_99"]), cost, too_long)]
    told += [limit_words(each["max_length"], each["longer"], each["answer_lost"], 0) for each in others if each["longer"]]
    return [f"           {line}" for line in told]


def limit_cost(run: RunConfig, spec: ModelSpec, device: Machine, found: Mapping[str, Any]) -> str:
    """Return what the limit that keeps 99 % of the rows whole costs in memory, with all else as the planner chose it.

    Every row of a batch is taken to be the longest: what was found of the data holds no length of each.
    """
    if not found["tokens"]:
        return ""
    longest, limit = found["tokens"]["max"], multiple(found["limits"]["keeps_99"])
    try:
        planned = choose(spec, run, device, longest=min(longest, run.max_length)).run
    except EngineError:
        return ""

    def need(most: int) -> Budget:
        return estimate(spec, replace(planned, max_length=most), device, longest=min(longest, most))

    return cost_words(spec, planned, limit, need)


def time_of(run: RunConfig, spec: ModelSpec, device: Machine, found: Mapping[str, Any]) -> Before | None:
    """Return how long a run on what was prepared takes, with the planner's choices made; None where that cannot be said."""
    prepared = found["prepared"]
    if not prepared:
        return None
    each = prepared["tokens"] / prepared["train_rows"]
    planned = choose(spec, run, device, longest=prepared["max_row_tokens"], mean=each).run
    return before(
        spec,
        planned,
        device,
        tokens_per_epoch=prepared["tokens"],
        steps=run.max_steps or max(1, math.ceil(prepared["steps_per_epoch"] * run.num_train_epochs)),
        steps_per_epoch=prepared["steps_per_epoch"],
        holdout_tokens=round(each * prepared["holdout_rows"]),
    )


def _prepared_line(found: Mapping[str, Any]) -> str:
    rows, tokens, learnt = (count(found[name]) for name in ("train_rows", "tokens", "supervised_tokens"))
    steps, dropped = count(found["steps_per_epoch"]), _rows(sum(found["dropped"].values()))
    return f"trained    {rows} rows, {tokens} tokens, {learnt} of them trained; {steps} steps an epoch; {dropped} dropped"


def _perplexity_lines(found: Mapping[str, Any]) -> list[str]:
    """Tell how well the base knows the answers: both ends, what goes, and some of the answers at the ends."""
    limit = f"{found['threshold']:g}"
    verb = "are left out" if found["applied"] else f"would be left out with --set perplexity_filter={limit}"
    lines = [f"known      {count(found['left_out'])} of {_rows(found['rows'])} {verb}: perplexity by the base under {limit}"]
    if found["under"] > found["left_out"]:
        most, all_of_them = percent(found["at_most"]), share_for(found["under"], found["rows"])
        lines.append(f"           {count(found['under'])} are under {limit}, but at most {most} of the rows go, the lowest first;")
        lines.append(f"           --set perplexity_drop_most={all_of_them:g} lets all of them go")
    if found["exempt"]:
        short = f"{count(found['exempt'])} answer{'' if found['exempt'] == 1 else 's'}"
        lines.append(f"           {short} under {found['exempt_tokens']} tokens {'is' if found['exempt'] == 1 else 'are'} not judged")
    highest = max((each["rows"] for each in found["histogram"]), default=0)
    for each in found["histogram"]:
        span = f"{each['low']:,g} - {each['high']:,g}" if each["high"] else f"{each['low']:,g} and more"
        bar = "#" * -(-each["rows"] * _BAR // max(1, highest))
        lines.append(f"           {span:>17} {bar:<{_BAR}} {count(each['rows'])}")
    for name in ("lowest", "highest"):
        told = (f"{each['perplexity']:,.4g}, row {each['row']}: {one_line(each['text'], limit=120)}" for each in found[name])
        lines += [f"{name:<10} {line}" for line in told]
    return lines


def _rows(number: int) -> str:
    return f"{count(number)} row{'' if number == 1 else 's'}"


def _example_lines(example: Mapping[str, Any], *, colour: bool) -> list[str]:
    """Show one row as runs of tokens; trained ones are marked at the margin, since colour may be missing."""
    lines = ["", f"row {example['row']}: {len(example['tokens'])} tokens, {sum(example['trained'])} trained (marked >)"]
    tokens = zip(example["tokens"], example["trained"], example["special"], strict=True)
    for trained, run in itertools.groupby(tokens, lambda token: token[1]):
        parts = [(bool(special), "".join(each[0] for each in some)) for special, some in itertools.groupby(run, lambda token: token[2])]
        text = one_line("".join(part for _, part in parts), limit=2000)
        if colour:
            text = _coloured(parts, trained=bool(trained))
        lines.append(f"  {'>' if trained else ' '} {text}")
    return lines


def _coloured(parts: Sequence[tuple[bool, str]], *, trained: bool) -> str:
    """Return escaped text with trained tokens in green and special ones dim; only these escapes reach the terminal."""
    shown = []
    for special, text in parts:
        codes = (_TRAINED if trained else "") + (_SPECIAL if special else "")
        safe = safe_text(text, limit=2000).replace("\n", " ").replace("\t", " ")
        shown.append(f"{codes}{safe}{_PLAIN if codes else ''}")
    return "".join(shown).strip()


def _turns(found: Mapping[str, Any]) -> str:
    """Tell turns read against turns written out: what a template loses shows here."""
    read, written = _roles(found["turns_in"]), found["turns_out"]
    if written is None:
        return f"{read} read"
    kept = "all of them written out" if written == found["turns_in"] else f"{_roles(written)} written out"
    return f"{read} read, {kept}; {count(found['trained_turns'])} trained"


def _roles(turns: Mapping[str, int]) -> str:
    return ", ".join(f"{count(number)} {one_line(role)}" for role, number in turns.items() if number) or "none"


def _share(tokens: Mapping[str, int]) -> str:
    return percent(tokens["supervised"] / tokens["total"]) if tokens["total"] else "0 %"
