"""The commands that print facts: budget, data, presets, doctor. None of them loads torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_tui.engine import preset
from qlora_tui.engine.errors import ConfigError, EngineError, ExitCode
from qlora_tui.engine.spec import RunConfig, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count, gib
from qlora_tui.tui.commands.settings import resolved
from qlora_tui.tui.printer import Streams, table
from qlora_tui.tui.reading import on_a_line

if TYPE_CHECKING:
    from qlora_tui.engine.data import Dataset
    from qlora_tui.engine.forecast import Before
    from qlora_tui.tui.probe import Probed


def budget(options: argparse.Namespace) -> int:
    """Print what a run needs: memory by item, time if the data are named, and what would make it fit."""
    from qlora_tui.engine import machine, preflight
    from qlora_tui.tui.commands import planning
    from qlora_tui.tui.probe import probe_lines

    run = preflight.bounded(resolved(options))
    if not run.model_name_or_path:
        raise ConfigError("no model named", hint="say --model DIR_OR_HUB_ID or --preset NAME", where="model_name_or_path")
    device = machine.find_card(options.card) if options.card else machine.look()
    spec = preflight.find_spec(run)
    preflight.bounded(
        run, *preflight.device_problems(run, device), *preflight.shape_problems(run, spec), *preflight.family_problems(run, spec, device)
    )
    streams = Streams()
    with on_a_line(streams.talk) as reading:
        needs = planning.needs(run, spec, device, reading=reading)
    probed = _probe(options, needs.plan.run, streams) if options.probe else None
    if probed is not None:
        needs = planning.needs(run, spec, device)  # again, now that this machine's speed is known
    if options.json:
        streams.data.document(needs.document(probed))
    else:
        lines = [*needs.lines(), *(probe_lines(probed) if probed else [])]
        streams.data.write("".join(f"{line}\n" for line in lines))
    return int(ExitCode.DONE if needs.budget.fits else ExitCode.WILL_NOT_FIT)


def _probe(options: argparse.Namespace, run: RunConfig, streams: Streams) -> Probed:
    """Make the test run, telling its phases; Ctrl+C ends it and leaves nothing behind."""
    from qlora_tui.tui.probe import probe

    if options.card:
        raise ConfigError("a card that is not here cannot be measured", hint="leave out --card or --probe", where="--probe")
    if not run.data:
        raise ConfigError("the test run needs rows", hint="name them with --data", where="--probe")
    told = ""

    def say(phase: str, done: int, total: int) -> None:
        nonlocal told
        line = f"test run: {phase}" + (f" {done}/{total}" if total else "")
        if line != told:
            told = line
            streams.talk.line(line)

    return probe(run, options.probe, say=say)


def data(options: argparse.Namespace) -> int:
    """Print what a dataset holds and, where a tokenizer is at hand, what would be trained on."""
    from qlora_tui.engine import data as room
    from qlora_tui.engine import preflight
    from qlora_tui.tui.commands import datareport, planning

    if options.path:
        options.flags["data"] = (*options.flags.get("data", ()), options.path)
    run = preflight.bounded(dataclasses.replace(resolved(options), skip_bad_rows=True))
    if not run.data or not all(run.data):
        raise ConfigError("no data named", hint="qlora-tui data FILE.jsonl", where="data")
    streams = Streams()
    tokenizer = None
    try:
        tokenizer = planning.tokenizer_of(run, ask_hub=True)
    except EngineError as error:
        streams.talk.line(f"without a tokenizer: {error}")
    if options.examples and tokenizer is None:
        streams.talk.line("examples need the model's tokenizer: name it with --model")
    blind = dataclasses.replace(run, perplexity_filter=0.0) if options.perplexity else run
    with on_a_line(streams.talk) as reading:
        rows = room.load(run, lenient=True, progress=reading.progress)
        held = room.load_eval(run, lenient=True, progress=reading.progress)
        found = room.describe(blind, rows, tokenizer, options.examples, eval_dataset=held, tell=reading.rows)
    if options.perplexity and found["usable"]:
        found |= _scores(run, rows, found, streams)
    cost, time = _estimates(run, found)
    if options.json:
        streams.data.document({**found, "time": time.to_json() if time else {"step_seconds": None, "total_seconds": None}})
    else:
        lines = datareport.data_lines(found, cost=cost, too_long=run.too_long, time=time, colour=streams.data.colours)
        streams.data.write("".join(f"{line}\n" for line in lines))
    return int(ExitCode.DONE if found["usable"] else ExitCode.USAGE)


def _scores(run: RunConfig, rows: Dataset, found: Mapping[str, Any], streams: Streams) -> dict[str, Any]:
    """Return how well the base knows the answers, and what is trained once those it knows are left out, telling what is done."""
    from qlora_tui.tui import scoring

    if not run.model_name_or_path:
        raise ConfigError("the base scores the answers, and no model is named", hint="say --model DIR_OR_HUB_ID", where="--perplexity")
    scored = scoring.score(run, say=_teller(streams))
    told: dict[str, Any] = {"perplexity": scoring.document(scored, run, lambda numbers: scoring.answers_of(rows.rows, numbers))}
    if run.perplexity_filter and found["prepared"] and scored.prepared is not None:
        prepared = dataclasses.asdict(scored.prepared)
        told["prepared"] = {name: prepared[name] for name in found["prepared"]}
        told["steps_per_epoch"] = scored.prepared.steps_per_epoch
    return told


def _teller(streams: Streams) -> Callable[[str, int, int], None]:
    """Return what tells on stderr how far work in another process is: each thing it does, and every tenth of it."""
    told: tuple[str, int] = ("", 0)

    def say(doing: str, done: int, total: int) -> None:
        nonlocal told
        now = (doing, done * 10 // total if total else 0)
        if now != told:
            told = now
            streams.talk.line(doing + (f": {count(done)} of {count(total)}" if total else ""))

    return say


def _estimates(run: RunConfig, found: Mapping[str, Any]) -> tuple[str, Before | None]:
    """Say what a longer limit costs, and how long the run takes, where the model is known without asking a network again."""
    from qlora_tui.engine import machine, preflight
    from qlora_tui.tui.commands import datareport

    if not found["tokens"]:
        return "", None
    try:
        spec, device = preflight.find_spec(run), machine.look()
        return datareport.limit_cost(run, spec, device, found), datareport.time_of(run, spec, device, found)
    except EngineError:
        return "", None


def presets(options: argparse.Namespace) -> int:
    """Print the ready-made runs, or one of them as written, with the reason for every value."""
    streams = Streams()
    if options.name and not options.json:
        streams.data.write(preset.load(options.name).text)
        return int(ExitCode.DONE)
    names = (options.name,) if options.name else preset.names()
    rows = [_preset_row(preset.load(name)) for name in names]
    if options.json:
        streams.data.document(rows)
        return int(ExitCode.DONE)
    shown = [(row["name"], row["card"], _fit_words(row), row["title"]) for row in rows]
    streams.data.write(table(("preset", "card", "here", "what for"), shown))
    streams.talk.line("qlora-tui presets NAME shows one in full; qlora-tui --preset NAME --data FILE starts with it")
    return int(ExitCode.DONE)


def doctor(options: argparse.Namespace) -> int:
    """Print what works here; a line that fails ends with the one command that mends it."""
    from qlora_tui.engine.doctor import checks

    streams = Streams()
    bad, rows = 0, []
    for check in checks():
        bad += not check.ok
        rows.append({"check": check.check, "ok": check.ok, "found": check.found, "mend": check.mend})
        if not options.json:
            mend = f"\n         mend: {one_line(check.mend)}" if check.mend and not check.ok else ""
            streams.data.write(f"{'ok ' if check.ok else 'BAD'}  {one_line(check.check)}: {one_line(check.found)}{mend}\n")
    if options.json:
        streams.data.document(rows)
    return int(ExitCode.FAILED if bad else ExitCode.DONE)


def dry_run(run: RunConfig, streams: Streams, *, as_json: bool) -> int:
    """Check a run as if to start it, and print the plan, the budget and the equivalent command; nothing is made."""
    from qlora_tui.engine import preflight
    from qlora_tui.tui.commands import planning

    with on_a_line(streams.talk) as reading:
        checked = preflight.check(run, fit=False, stopping=reading.stopping, progress=reading.progress)
    measured = len(checked.eval_dataset.rows) if checked.eval_dataset else None
    needs = planning.needs(run, checked.model_spec, checked.machine, rows=checked.dataset.rows, measured=measured)
    found, usable, refused = checked.dataset, len(checked.dataset.rows), len(checked.dataset.refused)
    command = planning.command_of(run)
    if as_json:
        about = {"format": found.format, "why": found.why, "usable": usable, "refused": refused}
        document = {"config": values_of(run), "data": about, "budget": needs.document(), "command": command, "runs_dir": run.runs_dir}
        streams.data.document(document)
    else:
        lines = [*needs.lines(), f"data    {count(usable)} usable rows of {one_line(found.format)}, {count(refused)} refused"]
        lines += [f"runs    {one_line(run.runs_dir)} (not made: this is a dry run)", f"command {one_line(command, limit=4000)}"]
        streams.data.write("".join(f"{line}\n" for line in lines))
    return int(ExitCode.DONE if needs.budget.fits else ExitCode.WILL_NOT_FIT)


def _preset_row(found: preset.Preset) -> dict[str, Any]:
    """Say how a preset fits this machine; a model that cannot be sized without a network has no answer."""
    from qlora_tui.engine import machine, models, planner

    run = preset.resolve(preset=found.name, config=None, flags={})
    spec = models.find(run.model_name_or_path)
    size = planner.choose(spec, run, machine.look()).budget if spec else None
    return {
        "name": found.name,
        "title": found.title,
        "card": found.card,
        "goal": found.goal,
        "why": found.why,
        "fits": size.fits if size else None,
        "total_bytes": size.total_bytes if size else None,
        "model": run.model_name_or_path,
    }


def _fit_words(row: Mapping[str, Any]) -> str:
    if row["total_bytes"] is None:
        return "unknown"
    return f"{'fits' if row['fits'] else 'too large'}, {gib(row['total_bytes'])}"
