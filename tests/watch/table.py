"""Measure the detectors on made-up and on recorded runs, and write the table of `engine/watch/README.md`.

    python tests/watch/table.py            # 200 seeds each, five to ten minutes on one core
    python tests/watch/table.py --seeds 5  # a look

Both kinds of trace go through the same `Watch` that sits in the loop. A false stop is a finding that would have ended a healthy
run with every detector allowed to stop it, so the column says what each would cost, not only the default.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from synthetic import EVERY, HEALTHY, ILL, ONSET, ONSETS, Trace

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.spec import WATCHED
from qlora_tui.engine.watch import HeldRow, Setting, Watch
from qlora_tui.engine.watch.replay import Held, Moment, replay

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "engine/watch/README.md"
BEGIN, END = "<!-- table: python tests/watch/table.py -->", "<!-- end of table -->"

NOTE, ALONE = " (note)", ", losses alone"
RECORDED: dict[str, tuple[int, tuple[str, ...], int, int]] = {
    "healthy-b1-1": (1, (), 0, 0),
    "healthy-b1-2": (1, (), 0, 0),
    "healthy-b4-1": (4, (), 0, 0),
    "healthy-b4-2": (4, (), 0, 0),
    "healthy-b16-1": (16, (), 0, 0),
    "healthy-b16-2": (16, (), 0, 0),
    "demo-healthy-b1": (1, (), 0, 0),
    "demo-healthy-b4": (4, (), 0, 0),
    "sorted-b1": (1, (), 0, 0),
    "sorted-b4": (4, (), 0, 0),
    "new-source-b4": (4, (), 0, 0),
    "new-source-b16": (16, (), 0, 0),
    "rate-b1": (1, ("spike", "drift"), 1, 80),
    "rate-b4": (4, ("spike", "drift"), 1, 50),
    "rate-b16": (16, ("spike", "drift"), 1, 50),
    "rate-b1, losses alone": (1, ("spike", "drift"), 1, 80),
    "rate-b4, losses alone": (4, ("spike", "drift"), 1, 80),
    "rate-b16, losses alone": (16, ("spike", "drift"), 1, 80),
    "demo-rate-b4, losses alone": (4, ("spike", "drift"), 1, 40),
    "rate-late-b4": (4, ("spike", "drift", "gradient"), 1, 200),
    "demo-rate-b4": (4, ("spike", "drift"), 1, 40),
    "shuffled-b4": (4, ("not_learning", "overfitting"), 1, 400),
    "noise-b4": (4, ("not_learning", "overfitting"), 1, 400),
    "overflow-b4": (4, ("non_finite",), 1, 400),
    "poisoned-b1": (1, ("spike (note)",), 1, 100),
    "poisoned-b4": (4, ("spike (note)",), 1, 100),
    "overfit-b4": (4, ("overfitting", "memorisation"), 1, 600),
    "no-holdout-b4": (4, ("memorisation", "overfitting"), 1, 600),
    "frozen-b4": (4, ("not_learning",), 1, 450),
}
"""Recorded runs: rows a step, the detectors that may name the illness (none: healthy), its onset, and within how many steps."""


@dataclass
class Outcome:
    """What the watch said about one run."""

    steps: int
    findings: list[Finding] = field(default_factory=list)

    def named(self, names: Iterable[str], onset: int) -> int | None:
        """Return how many steps after its onset one of `names` was sure enough to act, or None."""
        steps = [found.step - onset + 1 for found in self.sure(names) if found.step >= onset]
        return min(steps, default=None)

    def sure(self, names: Iterable[str]) -> list[Finding]:
        """Return what `names` said with enough evidence to act on; a note counts only of those marked so."""
        return [
            found for found in self.findings if (found.detector in names and found.severity == "stop") or found.detector + NOTE in names
        ]

    def stops(self, names: Iterable[str] = WATCHED) -> list[Finding]:
        """Return the findings of `names` that would have ended the run."""
        noted = {name.removesuffix(NOTE) for name in names if name.endswith(NOTE)}
        return [item for item in self.findings if item.detector in noted or (item.detector in names and item.severity == "stop")]


def judge(moments: Iterable[Moment], batch: int, warmup: int = 0) -> Outcome:
    """Let every detector see a run; all of them may say that they are sure."""
    told = replay(moments, Watch(Setting(0, warmup, batch), stop=WATCHED), on=True)
    return Outcome(told.steps, told.findings)


def recorded(name: str) -> Iterator[Moment]:
    """Yield a recorded run as the loop would have told it."""
    name, alone, _ = name.partition(ALONE)
    with (HERE / "traces" / f"{name}.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if alone and line["eval_loss"]:
                continue
            yield _held(line) if line["eval_loss"] else _step(line, int(line["step"]))


def _step(line: dict[str, str], number: int) -> Stepped:
    loss, norm = float(line["loss"]), float(line["grad_norm"])
    finite = math.isfinite(loss) and math.isfinite(norm)
    rows = tuple(int(row) for row in line["rows"].split())
    rate, epoch, tokens = float(line["learning_rate"] or 0), float(line["epoch"] or 0), int(line["tokens"] or 0)
    return Stepped(number, 0, epoch, loss, norm, norm > 1, not finite, rate, tokens, 0, 0.0, 0.0, rows)


def _held(line: dict[str, str]) -> Held:
    rows = [HeldRow(float(loss), 60) for loss in line["eval_rows"].split()]
    return Held(Evaluated(int(line["step"]), float(line["eval_loss"]), len(rows), 0.0), rows)


def runs_of(trace: Trace) -> Outcome:
    """Judge one made-up run as the loop does: before a stop the hold-out is asked."""
    watch, outcome = Watch(Setting(0, 20, trace.batch), stop=WATCHED), Outcome(0)
    for moment in trace.moments():
        if not isinstance(moment, Stepped):
            outcome.findings += watch.measured(moment.found, moment.rows)
            continue
        found, outcome.steps = watch.see(moment), moment.step
        looked = trace.look(moment.step) if watch.asks_holdout(found) else None
        if looked is not None:
            found = [*watch.weighed(found, looked.rows), *watch.measured(looked.found, looked.rows)]
        outcome.findings += found
    return outcome


def healthy_row(name: str, seeds: int) -> str:
    """Return the table's line of a healthy made-up run."""
    outcomes = [runs_of(trace) for trace in (HEALTHY[name](seed) for seed in range(seeds))]
    return f"| {name} | {seeds} | {_share(outcomes, ['spike'])} | {_share(outcomes, WATCHED)} | {_who(outcomes)} |"


def _share(outcomes: list[Outcome], names: Iterable[str]) -> str:
    return f"{sum(bool(outcome.stops(names)) for outcome in outcomes) / len(outcomes) * 100:.1f} %"


def _who(outcomes: list[Outcome]) -> str:
    said: dict[str, int] = {}
    for outcome in outcomes:
        for key in {found.detector + ("" if found.severity == "stop" else " (note)") for found in outcome.findings}:
            said[key] = said.get(key, 0) + 1
    return ", ".join(f"{name} {count / len(outcomes):.1%}" for name, count in sorted(said.items(), key=lambda item: -item[1])) or "-"


def ill_row(name: str, seeds: int) -> str:
    """Return the table's line of an ill made-up run."""
    make, names, within = ILL[name]
    onset = ONSETS.get(name, ONSET)
    delays = [runs_of(trace).named(names, onset) for trace in (make(seed) for seed in range(seeds))]
    known = [delay for delay in delays if delay is not None and delay <= within]
    middle = f"{statistics.median(known):.0f}" if known else "-"
    return f"| {name} | {', '.join(names)} | {len(known) / seeds:.1%} | {middle} | {within} |"


def recorded_row(name: str) -> str:
    """Return the table's line of a recorded run."""
    batch, names, onset, within = RECORDED[name]
    outcome = judge(recorded(name), batch, warmup=20)
    stops = ", ".join(f"{found.detector} at {found.step}" for found in outcome.stops()[:3]) or "none"
    if not names:
        return f"| {name} | {outcome.steps} | healthy | {stops} |"
    delay = outcome.named(names, onset)
    first = next((found for found in outcome.sure(names) if found.step >= onset), None)
    said = f"{first.detector} at step {first.step} ({first.severity})" if first and delay and delay <= within else "**missed**"
    return f"| {name} | {outcome.steps} | {said}, within {within} asked | {stops} |"


def table(seeds: int) -> str:
    """Return the three tables as Markdown."""
    lines = [
        f"Made up, healthy: {seeds} seeds of 1,000 steps; share of runs with a false stop by default (`spike`) and with every detector in",
        "`watch_stop`. The last column is the share of runs in which each detector said anything.", "",
        "| run | seeds | false stops, default | false stops, all | who spoke |", "|---|---|---|---|---|",
        *(healthy_row(name, seeds) for name in HEALTHY), "",
        f"Made up, ill: {seeds} seeds; the illness begins at step {ONSET}, the hold-out is measured every {EVERY} steps.", "",
        "| illness | named by | named in time | steps, median | steps, at most |", "|---|---|---|---|---|",
        *(ill_row(name, seeds) for name in ILL), "",
        "Recorded: real runs, see `tests/watch/traces/README.md`.", "",
        "| trace | steps | named | would stop, with every detector in `watch_stop` |", "|---|---|---|---|",
        *(recorded_row(name) for name in RECORDED if (HERE / "traces" / f"{name.removesuffix(ALONE)}.csv").exists()),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and put those of 200 seeds and more into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    made = table(seeds)
    print(made)
    if seeds < 200:
        return
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
