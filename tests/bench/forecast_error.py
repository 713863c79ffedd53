"""How far the forecast is off: before the start after the test run, and at step 20, against what the run then took.

usage: forecast_error.py run OUT.jsonl [--gpu [--tiny]] [--seconds N] [--only TEXT]   one JSON line a run; those in OUT are passed over
       forecast_error.py table OUT.jsonl                                              the lines as a Markdown table, and the marks

Without --gpu: tiny models on the processor, about 15 s a run (run with OMP_NUM_THREADS as it shall be used). With it: random
weights in the shapes of the catalogue, about a minute a run; with --tiny as well, their families alone on the processor, which
proves the script. Each run has a home of its own, so that it knows nothing but what its own test run of 50 rows measured. Everything
happens in one process through the trainer itself; a run that would begin after N seconds is named and left out, and runs when the command
is given again. Time counts from after loading and rehearsal, with the first measurement, to the written adapter; what the estimate
before the start says of loading is left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "gpu")]

import shapes  # noqa: E402  it makes the packages of this folder known
import torch  # noqa: E402
from cases import GEMMA3, LLAMA1, LLAMA3, LLAMA8, QWEN05, QWEN4, QWEN15  # noqa: E402
from conftest import write_model, write_tokenizer  # noqa: E402
from loop_driver import Asked  # noqa: E402

from qlora_tui.engine.data import load as load_data  # noqa: E402
from qlora_tui.engine.events import Event, Forecast, Phase, Stepped  # noqa: E402
from qlora_tui.engine.hub import ModelFiles  # noqa: E402
from qlora_tui.engine.machine import Machine  # noqa: E402
from qlora_tui.engine.models import from_folder  # noqa: E402
from qlora_tui.engine.spec import RunConfig, from_values  # noqa: E402
from qlora_tui.engine.train import Job, train  # noqa: E402
from qlora_tui.tui.commands import planning  # noqa: E402
from qlora_tui.tui.probe import small  # noqa: E402

AT = 20
PROBE_ROWS = 50


@dataclass(frozen=True, slots=True)
class Case:
    """One run: rows of `low` to `high` tokens, `skew` times as many short ones, and what differs from two rows at once, summed twice."""

    name: str
    rows: int
    low: int
    high: int
    more: dict[str, Any] = field(default_factory=dict)
    shape: str = ""
    skew: float = 1.0
    tiny: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: Path) -> RunConfig:
        """Return its settings."""
        usual = {
            "model_name_or_path": str(folder / "model"),
            "data": (str(folder / "rows.jsonl"),),
            "runs_dir": str(folder / "runs"),
            "max_length": self.high,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "val_set_size": 24.0,
            "num_train_epochs": 1.0,
            "learning_rate": 1e-4,
        }
        return from_values(usual | self.more)


WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "max_position_embeddings": 2048}
DEEP = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 12, "max_position_embeddings": 2048}

CPU_CASES = (
    Case("short rows, one epoch", 420, 30, 120, {"gradient_accumulation_steps": 1}, tiny=WIDE),
    Case("mixed rows, two epochs", 260, 30, 400, {"num_train_epochs": 2.0}, tiny=WIDE, skew=2.0),
    Case("all alike", 400, 200, 210, tiny=WIDE),
    Case("a long tail", 300, 30, 900, {"per_device_train_batch_size": 1}, tiny=DEEP, skew=4.0),
    Case("measured every 5 steps", 300, 40, 200, {"eval_steps": 5}, tiny=WIDE),
    Case("measured at the end alone", 360, 40, 300, {"eval_steps": 100000}, tiny=WIDE),
    Case("saved every 3 steps", 300, 40, 200, {"save_steps": 3}, tiny=WIDE),
    Case("16-bit base, recomputed", 300, 60, 300, {"method": "lora", "gradient_checkpointing": "true"}, tiny=WIDE),
    Case("many layers, four at once", 480, 20, 160, {"per_device_train_batch_size": 4}, tiny=DEEP),
    Case("large hold-out", 400, 40, 240, {"val_set_size": 120.0}, tiny=WIDE),
    Case("60 steps of 200 planned", 900, 30, 250, {"max_steps": 60}, tiny=WIDE),
    Case("rank 64, DoRA", 300, 40, 200, {"lora_r": 64, "use_dora": True}, tiny=WIDE),
)
GPU_CASES = (
    Case("0.5 B, short rows", 6400, 40, 200, {"per_device_train_batch_size": 8}, QWEN05),
    Case("0.5 B, a long tail", 2800, 60, 2048, {"per_device_train_batch_size": 4}, QWEN05, skew=4.0),
    Case("1 B, two epochs", 1000, 100, 1000, {"num_train_epochs": 2.0, "per_device_train_batch_size": 4}, LLAMA1, skew=2.0),
    Case("1.5 B, saved often", 2000, 100, 800, {"save_steps": 5, "per_device_train_batch_size": 4}, QWEN15),
    Case("1.5 B, measured often", 1500, 100, 800, {"eval_steps": 10, "val_set_size": 64.0, "gradient_checkpointing": "true"}, QWEN15),
    Case("Gemma 3 1 B", 2000, 100, 1000, {"per_device_train_batch_size": 4}, GEMMA3),
    Case("3 B, 16-bit", 900, 200, 1200, {"method": "lora"}, LLAMA3),
    Case(
        "4 B, chosen by the planner", 640, 100, 1500, {"per_device_train_batch_size": 0, "gradient_accumulation_steps": 8}, QWEN4, skew=2.0
    ),
    Case("8 B, recomputed", 700, 200, 1000, {"gradient_checkpointing": "true"}, LLAMA8),
    Case("1 B, no graphs", 1200, 100, 700, {"cuda_graphs": "off"}, LLAMA1),
)


def write_rows(path: Path, case: Case) -> None:
    """Write chats whose lengths lie between the bounds; a `skew` above one makes short ones frequent."""
    source = random.Random(case.name)
    frame = len("user\ngo\nassistant\n\n") + 4
    with path.open("w") as file:
        for number in range(case.rows):
            length = int(case.low + (case.high - case.low) * source.random() ** case.skew)
            text = f"{number:05d} " + "abcdefgh " * length
            turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": text[: max(4, length - frame)]}]
            file.write(json.dumps({"messages": turns}) + "\n")


@dataclass(slots=True)
class Clocked:
    """Events with the moment at which each came; `ended` is when the last was done."""

    events: list[tuple[float, Event]]
    ended: float


def clocked(run: RunConfig, folder: Path, machine: Machine) -> Clocked:
    """Train as the session does, but for its thread and journal, and keep the time."""
    folder.mkdir(parents=True)
    model = Path(run.model_name_or_path)
    asked, found = Asked(), list[tuple[float, Event]]()
    job = Job(
        run=run,
        folder=folder,
        model_files=ModelFiles(model),
        model_spec=from_folder(model),
        dataset=load_data(run),
        eval_dataset=None,
        machine=machine,
        wishes=asked,
        say=lambda event: None,
    )
    for event in train(job):
        found.append((time.monotonic(), event))
    return Clocked(found, time.monotonic())


def measure(case: Case, folder: Path, machine: Machine, *, tiny: bool) -> dict[str, Any]:
    """Make the test run and the run, and return both forecasts beside the truth."""
    shapes.use_home(folder)
    write_rows(folder / "rows.jsonl", case)
    spec = shapes.spec_of(case.shape, tiny=tiny) if case.shape else None
    if spec is None:
        write_model(folder / "model", **case.tiny)
        write_tokenizer(folder / "model")
    else:
        shapes.write_small_files(folder / "model", spec)
    run = case.run(folder)
    found = from_folder(folder / "model")
    with shapes.made_here(spec) if spec else nullcontext():
        planned = planning.needs(run, found, machine).plan.run
        shapes.clear()
        clocked(small(planned, PROBE_ROWS), folder / "probe", machine)
        before = planning.needs(run, found, machine).time
        shapes.clear()
        ran = clocked(run, folder / "run", machine)
    assert before is not None
    return {"case": case.name, "shape": case.shape, "device": machine.name} | judged(ran, before)


def judged(ran: Clocked, before: Any) -> dict[str, Any]:
    """Return what was forecast, and what it took."""
    start = next(t for t, event in ran.events if isinstance(event, Phase) and event.name == "save" and event.state == "begin")
    truth = ran.ended - start
    forecasts, step = list[tuple[int, float, Forecast]](), 0
    for t, event in ran.events:
        step = event.step if isinstance(event, Stepped) else step
        forecasts += [(step, t, event)] if isinstance(event, Forecast) else []
    steps = [event for _, event in ran.events if isinstance(event, Stepped)]
    rates = [one.seconds / one.tokens for one in steps]
    line: dict[str, Any] = {"seconds": round(truth, 2), "steps": len(steps)}
    low, middle, high = (one - other for one, other in zip(before.total_seconds, before.load_seconds, strict=True))
    line["probed"] = told(low, middle, high, truth)
    for name, wanted in (("start", 0), ("at_20", AT)):
        _, t, event = next(found for found in forecasts if found[0] == wanted)
        line[name] = told(*(t - start + left for left in event.seconds_left), truth)
        line[name]["left_error"] = round(event.seconds_left[1] / (ran.ended - t) - 1, 4)
        line[name]["basis"] = event.basis
    late, early = statistics.median(rates[AT:]), statistics.median(rates[1:AT])
    return line | {"drift": round(late / early - 1, 4), "slowest": round(max(rates[AT:]) / late, 2)}


def told(low: float, middle: float, high: float, truth: float) -> dict[str, Any]:
    """Return a forecast of the whole beside the truth."""
    return {
        "forecast": [round(seconds, 2) for seconds in (low, middle, high)],
        "error": round(middle / truth - 1, 4),
        "holds": low <= truth <= high,
    }


def run_all(out: Path, *, gpu: bool, tiny: bool, seconds: float, only: str) -> int:
    """Measure the runs that `out` does not hold yet; returns how many were left out for lack of time."""
    done = {line["case"] for line in read(out)} if out.exists() else set()
    began, left = time.monotonic(), 0
    machine = shapes.device_of(tiny or not gpu)
    for case in GPU_CASES if gpu else CPU_CASES:
        if case.name in done or only.lower() not in case.name.lower():
            continue
        if time.monotonic() - began > seconds:
            print(f"left out: {case.name}", flush=True)
            left += 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                line = measure(case, Path(folder), machine, tiny=tiny)
            except Exception as error:  # noqa: BLE001  the others are still worth their time
                line = {"case": case.name, "failed": f"{type(error).__name__}: {error}"[:400]}
        if "failed" not in line:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        shapes.clear()
    return left


def read(out: Path) -> list[dict[str, Any]]:
    """Return the lines of an output file."""
    return [json.loads(line) for line in out.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines for people, with the marks below."""
    kinds = ("probed", "start", "at_20")
    rows = ["| run | steps | took | after the test run | at the start | at step 20 | of what was left | speed later |", "|---" * 8 + "|"]
    for line in lines:
        cells = [f"{line[kind]['error']:+.1%}{'' if line[kind]['holds'] else ' (outside its range)'}" for kind in kinds]
        rows.append(
            f"| {line['case']} | {line['steps']} | {line['seconds']:.0f} s | {' | '.join(cells)} | "
            f"{line['at_20']['left_error']:+.1%} | {line['drift']:+.1%} |"
        )
    marks = []
    for kind, mark in (("probed", 0.15), ("start", 0.15), ("at_20", 0.05)):
        errors = [abs(line[kind]["error"]) for line in lines]
        good, held = sum(error <= mark for error in errors), sum(line[kind]["holds"] for line in lines)
        middle = statistics.median(errors)
        marks.append(f"- {kind}: {good} of {len(lines)} within {mark:.0%}, median {middle:.1%}; the range holds {held} of {len(lines)}")
    return "\n".join([*rows, "", *marks])


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.what == "table":
        print(table(read(options.out)))
        return 0
    torch.manual_seed(0)
    return min(1, run_all(options.out, gpu=options.gpu, tiny=options.tiny, seconds=options.seconds, only=options.only))


if __name__ == "__main__":
    sys.exit(main())
