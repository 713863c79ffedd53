"""Measured against predicted on a grid of configurations: peaks by phase and seconds a step.

usage: grid.py run OUT.jsonl [--cpu] [--only TEXT,TEXT] [--part I/N] [--seconds N]   a JSON line a configuration, appended
       grid.py table OUT.jsonl [--anew]          the lines as a Markdown table, with median and worst error

Each configuration runs in a process of its own, as people's runs do: what earlier ones leave on a card (libraries' workspaces, cached
blocks) would be measured as its own. The processes are forked from one that has imported torch and transformers, which takes most of
a start, and has not asked CUDA. A configuration that would begin after N seconds is named and left out, and runs when the
command is given again. `--only` takes those whose name has one of the texts, `--part 1/4` the first of every four: so four cards of
one host, each named by `CUDA_VISIBLE_DEVICES`, share the work. `--cpu` runs the same code on tiny shapes: it proves the script and
measures nothing of interest. `--anew` predicts with the formulas of now what was measured then. Predictions are the formulas' own:
what earlier configurations taught is forgotten, but for the speed of the card's pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

from cases import CASES, Case  # noqa: E402  found through the line above; what asks CUDA when it is imported is for the children

GIB = 1 << 30
WARM = 2
MEASURED_AS = {"probe": "train", "train": "train", "eval": "eval", "save": "save", "load": "load"}


def measure_case(case: Case, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run one configuration in this process and return what the table needs of it."""
    import shapes
    import torch

    from qlora_tui.engine.events import Stepped

    machine = shapes.device_of(tiny)
    spec = shapes.spec_of(case.shape, tiny=tiny)
    model = folder / "model"
    if case.saved:
        shapes.write_checkpoint(model, spec, torch.device(machine.kind))
    else:
        shapes.write_small_files(model, spec)
    run = case.run(model, tiny=tiny)
    shapes.forget_all_but_speed(machine)
    began = time.monotonic()
    ran = shapes.run_once(run, spec, folder / "case", machine)
    took = time.monotonic() - began
    shapes.forget_all_but_speed(machine)  # the prediction below rests on the pieces that this run measured before its step 1
    line: dict[str, Any] = {"case": case.name, "shape": case.shape, "device": machine.name, "took": round(took, 1), "saved": case.saved}
    if ran.error is not None or not ran.of(Stepped)[WARM:]:
        return line | {"error": f"{type(ran.error).__name__}: {ran.error}"[:600]}
    return line | figures(ran, run, spec, machine)


def figures(ran: Any, run: Any, spec: Any, machine: Any) -> dict[str, Any]:
    """Return measured and predicted bytes by phase, and seconds a step."""
    from qlora_tui.engine import budget, forecast, measured
    from qlora_tui.engine.events import Phase, Planned, Record, Stepped
    from qlora_tui.engine.train.choices import as_before

    steps = ran.of(Stepped)
    longest = round(steps[0].tokens / len(steps[0].rows))
    run = as_before(run, [Record(0, 0.0, 0, ran.of(Planned)[-1])])  # as it ran: nothing is left open
    estimate = budget.estimate(spec, run, machine, longest=longest)
    found: dict[str, int] = {}
    for event in ran.of(Phase):
        if event.state == "end" and event.peak_bytes:
            kind = MEASURED_AS[event.name]
            found[kind] = max(found.get(kind, 0), event.peak_bytes)
    late = steps[WARM:]
    per_token = forecast.seconds_per_token(spec, run, machine, row_tokens=longest)
    return {
        "predicted": {phase.name: phase.bytes for phase in estimate.phases},
        "measured": found,
        "items": {item.name: item.bytes for item in estimate.items},
        "choices": dict(ran.of(Planned)[-1].choices),
        "reserved": max(step.memory_reserved_bytes for step in steps),
        "allocated": max(step.memory_peak_bytes for step in steps),
        "seconds_predicted": per_token * late[0].tokens if per_token else None,
        "seconds_measured": statistics.median(step.seconds for step in late),
        "seconds_each": [round(step.seconds, 4) for step in late],
        "speed": dataclasses.asdict(speed) if (speed := measured.speed(machine.name)) else None,
        "tokens_per_step": late[0].tokens,
    }


def predicted_anew(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with what would be predicted now, on the card and with the pieces of it that were measured then."""
    from qlora_tui.engine import budget, forecast, measured, models
    from qlora_tui.engine.machine import find_card
    from qlora_tui.engine.measured import Speed

    if "error" in line:
        return line
    case = next(case for case in CASES if case.name == line["case"])
    run, spec, card = (
        dataclasses.replace(case.run(Path("model"), tiny=False), **line["choices"]),
        models.find(case.shape),
        find_card(line["device"]),
    )
    assert spec is not None
    measured.remember_speed(card.name, "", Speed(**line["speed"]))
    estimate = budget.estimate(spec, run, card, longest=case.length)
    seconds = forecast.seconds_per_token(spec, run, card, row_tokens=case.length)
    predicted = {phase.name: phase.bytes for phase in estimate.phases}
    return line | {"predicted": predicted, "seconds_predicted": seconds and seconds * line["tokens_per_step"]}


def run_all(out: Path, cases: Iterable[Case], *, cpu: bool, seconds: float) -> int:
    """Measure the cases that `out` does not hold yet; returns how many were left out for lack of time."""
    from qlora_tui.engine.session import settle_libraries

    settle_libraries()  # before torch is imported, as in any run
    import transformers.models.auto.modeling_auto  # noqa: F401  the slow part of a start, once for all children

    done = {line["case"] for line in read(out)} if out.exists() else set()
    began, left = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"QLORA_TUI_HOME": f"{home}/home", "HF_HUB_OFFLINE": "1"}
        for number, case in enumerate(case for case in cases if case.name not in done):
            if time.monotonic() - began > seconds:
                print(f"left out: {case.name}", flush=True)
                left += 1
                continue
            child = multiprocessing.get_context("fork").Process(target=_alone, args=(case, out, Path(home) / str(number), cpu))
            child.start()
            child.join()
            if child.exitcode:
                print(f"{case.name}: its process ended with {child.exitcode}", flush=True)
    return left


def _alone(case: Case, out: Path, folder: Path, cpu: bool) -> None:
    line = measure_case(case, folder, tiny=cpu)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(short(line), flush=True)


def short(line: dict[str, Any]) -> str:
    """Return one line for whoever watches."""
    if "error" in line:
        return f"{line['case']}: {line['error']}"
    return f"{line['case']}: {line['took']} s, memory {error_of(line):+.1%}, time {time_error(line):+.1%}"


def read(out: Path) -> list[dict[str, Any]]:
    """Return the lines of an output file."""
    return [json.loads(line) for line in out.read_text().splitlines()]


def counted(line: dict[str, Any]) -> tuple[int, int]:
    """Return predicted and measured peak over the phases that were measured; a base that was made and not loaded has no load phase."""
    phases = [name for name in line["predicted"] if name in line["measured"] and (line["saved"] or name != "load")]
    return max(line["predicted"][name] for name in phases), max(line["measured"][name] for name in phases)


def error_of(line: dict[str, Any], phase: str = "") -> float:
    """Return predicted over measured, less one: below zero is an under-estimate."""
    predicted, found = (line["predicted"][phase], line["measured"][phase]) if phase else counted(line)
    return float(predicted / found - 1)


def time_error(line: dict[str, Any]) -> float:
    """Return the error of a step's seconds; NaN where nothing was predicted."""
    return line["seconds_predicted"] / line["seconds_measured"] - 1 if line["seconds_predicted"] else float("nan")


def table(lines: list[dict[str, Any]]) -> str:
    """Return the table with median and worst errors."""
    good = [line for line in lines if "error" not in line]
    rows = ["| configuration | predicted | measured | error | train | eval | load | step predicted | measured | error |", "|---" * 10 + "|"]
    for line in good:
        predicted, found = counted(line)
        shown = [f"{error_of(line, phase):+.1%}" if phase in line["measured"] else "" for phase in ("train", "eval")]
        loaded = f"{error_of(line, 'load'):+.1%}" if line["saved"] else ""
        step = f"{line['seconds_predicted']:.3f} s" if line["seconds_predicted"] else ""
        cells = [line["case"], f"{predicted / GIB:.2f} GiB", f"{found / GIB:.2f} GiB", f"{error_of(line):+.1%}", *shown, loaded]
        rows.append("| " + " | ".join([*cells, step, f"{line['seconds_measured']:.3f} s", f"{time_error(line):+.1%}"]) + " |")
    memory, seconds = [error_of(line) for line in good], [time_error(line) for line in good if line["seconds_predicted"]]
    rows += ["", *summary("peak memory", memory), *summary("seconds a step", seconds)]
    rows += [f"- failed: {line['case']}: {line['error']}" for line in lines if "error" in line]
    return "\n".join(rows)


def summary(what: str, errors: list[float]) -> list[str]:
    """Return median, worst and lowest error in words."""
    if not errors:
        return []
    size = [abs(error) for error in errors]
    return [
        f"- {what}, {len(errors)} configurations: median error {statistics.median(size):.1%}, worst {max(size):.1%}, "
        f"lowest estimate {min(errors):+.1%}, median signed {statistics.median(errors):+.1%}"
    ]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--anew", action="store_true")
    options = parser.parse_args()
    if options.what == "table":
        with tempfile.TemporaryDirectory() as home:
            os.environ["QLORA_TUI_HOME"] = home  # what this machine measured is left alone
            lines = read(options.out)
            print(table([predicted_anew(line) for line in lines] if options.anew else lines))
        return 0
    wanted = options.only.lower().split(",")
    part, parts = map(int, options.part.split("/"))
    cases = [case for case in CASES if any(text in case.name.lower() for text in wanted)][part - 1 :: parts]
    return min(1, run_all(options.out, cases, cpu=options.cpu, seconds=options.seconds))


if __name__ == "__main__":
    sys.exit(main())
