"""Runs on an imitated smaller card: what is said to fit runs, what is not is refused in time, and the planner finds the fastest.

usage: limits.py fit  OUT.jsonl [--limit 24] [--shape ID] [--seconds N] [--cpu]   one that just fits, one that does not, its first fix
       limits.py plan OUT.jsonl [--limit 24] [--shape ID] [--seconds N] [--cpu]   the planner's choice against every fixed setting that fits

`memory_limit_gib` holds the allocator and the planner alike, CUDA's context counted. A trial that would begin after N seconds is left
out, and made when the command is given again with the same OUT; those in it are not made twice. `--cpu` runs the same code on a tiny
shape with a pretended card, to prove the script. The exit code is 0 if everything came out as it should, 75 if trials were left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import shapes
import torch
from loop_driver import Ran

from qlora_tui.engine import budget
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Finding, Phase, Planned, Stepped
from qlora_tui.engine.machine import limited
from qlora_tui.engine.spec import KEYS, RunConfig, from_values
from qlora_tui.engine.train.step import Gradient
from qlora_tui.engine.values import read_text

GIB = 1 << 30
WARM, STEPS = 1, 4
LAST = {"final_checks": False, "max_steps": 3}
"""What a trial of speed leaves out: what comes after the last step, and a step."""
NEAR = 0.05
SHAPE = "meta-llama/Llama-3.1-8B-Instruct"
FIXED_ROWS, FIXED_LAYERS = (1, 2, 4, 8), ("true", "24", "16", "8", "false")


class LeftOut(Exception):
    """Time was up before this trial."""


class Bench:
    """One shape on one limited machine; each trial is a whole run whose outcome is written down."""

    def __init__(self, home: Path, out: Path, shape: str, limit: float, *, seconds: float, cpu: bool) -> None:
        shapes.use_home(home)
        self.until = time.monotonic() + seconds
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.known = {line["what"]: line for line in lines if line["limit_gib"] == limit}
        self.home, self.out, self.cpu, self.limit = home, out, cpu, limit
        self.machine = shapes.device_of(cpu)
        self.spec = shapes.spec_of(shape, tiny=cpu)
        self.model = home / "model"
        shapes.write_small_files(self.model, self.spec)
        self.trials = 0

    def run_of(self, **values: Any) -> RunConfig:
        """Return a run on this model with this limit."""
        usual = {
            "model_name_or_path": str(self.model),
            "method": "qlora",
            "optim": "adamw_torch" if self.cpu else "auto",
            "memory_limit_gib": self.limit,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": STEPS,
            "num_train_epochs": 100.0,
        }
        return from_values({**usual, **values})

    def share(self, run: RunConfig) -> float:
        """Return the estimate's share of what the run may use."""
        estimate = budget.estimate(self.spec, run, self.machine, longest=run.max_length)
        return estimate.total_bytes / limited(self.machine, run).free_bytes

    def promise(self, run: RunConfig) -> tuple[bool, float]:
        """Return what a run is preferred by: said to fit with the estimate's margin, and then the closest."""
        estimate = budget.estimate(self.spec, run, self.machine, longest=run.max_length)
        return not estimate.tight, self.share(run)

    def trial(self, what: str, run: RunConfig) -> dict[str, Any]:
        """Run once and write down what came of it, unless that was done before.

        Raises:
            LeftOut: time is up.
        """
        if what in self.known:
            return self.known[what]
        if time.monotonic() > self.until:
            raise LeftOut(what)
        self.trials += 1
        shapes.forget_all_but_speed(self.machine)
        ran = shapes.run_once(run, self.spec, self.home / str(self.trials), self.machine)
        shapes.forget_all_but_speed(self.machine)
        line = {"what": what, "device": self.machine.name, "limit_gib": self.limit, "estimate_share": round(self.share(run), 4)} | told(ran)
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


def told(ran: Ran) -> dict[str, Any]:
    """Return the outcome of a run: how it ended, how fast it was, what it held by phase."""
    steps = ran.of(Stepped)
    plan = ran.of(Planned)[-1] if ran.of(Planned) else Planned({})
    found: dict[str, Any] = {
        "outcome": ran.result.outcome if ran.result else type(ran.error).__name__,
        "error": str(ran.error or ""),
        "steps": len(steps),
        "choices": dict(plan.choices),
        "why": plan.why,
        "peaks": {event.name: event.peak_bytes for event in ran.of(Phase) if event.state == "end" and event.peak_bytes},
        "took": {event.name: round(event.seconds, 1) for event in ran.of(Phase) if event.state == "end" and event.seconds},
        "findings": [finding.message for finding in ran.of(Finding)],
        "leaner": [finding.message for finding in ran.of(Finding) if finding.detector == "memory"],
    }
    late = steps[WARM:]
    if late:
        seconds = statistics.median(step.seconds for step in late)
        predicted = plan.seconds_per_token * late[0].tokens if plan.seconds_per_token else None
        found |= {"tokens_per_second": late[0].tokens / seconds, "step_seconds": seconds, "step_seconds_predicted": predicted}
    return found


def fit(bench: Bench) -> list[str]:
    """Show 3: returns what did not come out as it should."""
    half = "true" if bench.cpu else str(bench.spec.num_hidden_layers // 2)
    run = bench.run_of(per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=half)
    lengths = range(64, 4096, 64) if bench.cpu else range(256, 8192, 16)
    runs = [dataclasses.replace(run, max_length=length) for length in lengths]
    if bench.cpu:  # whatever limit was asked for: one that lies between the lengths
        free = limited(bench.machine, run).free_bytes / GIB
        bench.limit = free * (bench.share(runs[0]) + bench.share(runs[-1])) / 2
        runs = [dataclasses.replace(one, memory_limit_gib=bench.limit) for one in runs]
    close = NEAR / 2 if bench.cpu else NEAR
    fitting = [one for one in runs if 1 - close <= bench.share(one) <= 1]
    beyond = [one for one in runs if bench.share(one) >= 1 + close]
    if not fitting or not beyond:
        return [f"no length comes within {NEAR:.0%} of {bench.limit} GiB: shares {bench.share(runs[0]):.2f} to {bench.share(runs[-1]):.2f}"]
    near, over = max(fitting, key=bench.promise), min(beyond, key=bench.share)
    faults = []
    with pretended(bench.cpu, 2 * near.max_length):
        done = bench.trial("said to fit by less than 5 %", near)
        if done["outcome"] != "done":
            faults.append(f"said to fit and did not run: {done['error']}")
        refused = bench.trial("said not to fit", over)
        if refused["outcome"] != WontFit.__name__ or refused["steps"]:
            faults.append(f"said not to fit, and was not refused in the rehearsal: {refused['outcome']} after {refused['steps']} steps")
            return faults
        fixed = dataclasses.replace(over, **first_fix(refused["error"]))
        mended = bench.trial(f"with the first fix, {first_fix(refused['error'])}", fixed)
        if mended["outcome"] != "done":
            faults.append(f"the first fix did not help: {mended['error']}")
    return faults


def first_fix(said: str) -> dict[str, Any]:
    """Return the settings of the first fix that a refusal names."""
    options = re.search(r"(?:try|save most:) ((?:--set \S+ ?)+)", said)
    pairs = re.findall(r"--set (\w+)=(\S+)", options[1]) if options else []
    return {name: read_text(KEYS[name], value) for name, value in pairs}


def plan(bench: Bench) -> list[str]:
    """Show 4: the planner's choice against every fixed setting; returns what did not come out as it should."""
    length = 96 if bench.cpu else 2048
    open_run = bench.run_of(per_device_train_batch_size=0, gradient_accumulation_steps=8, max_length=length, **LAST)
    bench.trial("warm-up, to measure the card's pieces", dataclasses.replace(open_run, gradient_checkpointing="true"))
    chosen = bench.trial("the planner's choice, rows and layers open", open_run)
    two = dataclasses.replace(open_run, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    chosen_two = bench.trial("the planner's choice, 2 rows at once", two)
    fixed: dict[tuple[int, str], float] = {}
    rows_tried, layers_tried = ((1, 2), ("true", "2", "false")) if bench.cpu else (FIXED_ROWS, FIXED_LAYERS)
    for rows in rows_tried:
        for layers in layers_tried:
            run = dataclasses.replace(
                open_run, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, gradient_checkpointing=layers
            )
            if bench.share(run) > 1.15:
                continue  # far beyond: the rehearsal would only say so
            line = bench.trial(f"fixed: {rows} rows, {layers} layers recomputed", run)
            if line["outcome"] == "done" and not line["leaner"]:  # as asked for, to the end
                fixed[rows, layers] = line["tokens_per_second"]
    return [*slower(chosen, fixed, "rows and layers open"), *slower(chosen_two, {k: v for k, v in fixed.items() if k[0] == 2}, "2 rows")]


def slower(chosen: dict[str, Any], fixed: dict[tuple[int, str], float], what: str) -> list[str]:
    """Say where a fixed setting beats the planner's by more than the noise of a step's time."""
    if "tokens_per_second" not in chosen:
        return [f"{what}: the planner's choice did not run: {chosen['error']}"]
    if not fixed:
        return [f"{what}: no fixed setting fits"]
    best = max(fixed, key=lambda setting: fixed[setting])
    ratio = chosen["tokens_per_second"] / fixed[best]
    predicted, found = chosen["step_seconds_predicted"], chosen["step_seconds"]
    time = f", step predicted {predicted:.3f} s, measured {found:.3f} s" if predicted else ""
    print(
        f"{what}: {chosen['tokens_per_second']:,.0f} tokens/s, {ratio:.3f} of the best fixed {best} at {fixed[best]:,.0f}{time}", flush=True
    )
    return [f"{what}: fixed {best} is {1 / ratio:.2f}x as fast"] if ratio < 0.99 else []


@contextmanager
def pretended(cpu: bool, most_tokens: int) -> Iterator[None]:
    """On a CPU, pretend a card on which more tokens at once than that run out of memory; a processor refuses nothing by itself."""
    real: Callable[..., Any] = Gradient.add

    def add(self: Gradient, rows: Any, supervised: int, first: Any = None) -> Any:
        if self.halving.rows * max(len(row.input_ids) for row in rows) > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows, supervised, first)

    if cpu:
        Gradient.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        Gradient.add = real  # type: ignore[method-assign]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "plan"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=24.0)
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home), options.out, options.shape, options.limit, seconds=options.seconds, cpu=options.cpu)
        try:
            faults = {"fit": fit, "plan": plan}[options.what](bench)
        except LeftOut as trial:
            print(f"left out from here: {trial}", flush=True)
            return os.EX_TEMPFAIL
    for fault in faults:
        print(f"NOT AS IT SHOULD BE: {fault}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
