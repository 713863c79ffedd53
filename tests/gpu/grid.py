"""Measured against predicted on a grid of configurations: peaks by phase and seconds a step.

usage: grid.py run OUT.jsonl [--cpu] [--only TEXT] [--seconds N]     one JSON line a configuration, appended
       grid.py table OUT.jsonl                                       the lines as a Markdown table, with median and worst error

Everything runs in one process, since starting one takes ten seconds; a configuration that would begin after N seconds is
named and left out, and runs when the command is given again. `--cpu` runs the same code on tiny shapes: it proves the script and
measures nothing of interest. Predictions are the formulas' own: what earlier configurations taught is forgotten, but for
the speed of the card's pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import shapes
import torch
from loop_driver import Ran

from qlora_tui.engine import budget, forecast
from qlora_tui.engine.events import Phase, Planned, Record, Stepped
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.train.choices import as_before

GIB = 1 << 30
WARM = 2
STEPS = 5
MEASURED_AS = {"probe": "train", "train": "train", "eval": "eval", "save": "save", "load": "load"}

QWEN05, QWEN15, QWEN7 = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
LLAMA1, LLAMA3, LLAMA8 = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
QWEN4, QWEN14 = "Qwen/Qwen3-4B", "Qwen/Qwen3-14B"
GEMMA2, GEMMA3, PHI4, PHI35 = "google/gemma-2-2b-it", "google/gemma-3-1b-it", "microsoft/phi-4", "microsoft/Phi-3.5-mini-instruct"
MISTRAL, SMOL3 = "mistralai/Mistral-7B-Instruct-v0.3", "HuggingFaceTB/SmolLM3-3B"


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: shape, rows at once, tokens a row, layers checkpointed, and what differs from nf4, rank 16, paged 8 bits."""

    shape: str
    rows: int
    length: int
    layers: str
    more: dict[str, Any] = field(default_factory=dict)
    saved: bool = False

    @property
    def name(self) -> str:
        """The configuration in one line."""
        more = " ".join(str(value) for value in self.more.values())
        return f"{self.shape.split('/')[-1]} {self.rows}x{self.length} ckpt={self.layers} {more}{' loaded' if self.saved else ''}".strip()

    def run(self, folder: Path, *, tiny: bool) -> RunConfig:
        """Return the settings; two micro-batches a step, so that the second meets the gradients of the first."""
        usual = {"lora_r": 16, "optim": "paged_adamw_8bit", "bnb_4bit_quant_type": "nf4", "method": "qlora"}
        small = {"max_length": min(self.length, 96), "optim": self.more.get("optim", "adamw_torch").removeprefix("paged_")} if tiny else {}
        rows = min(self.rows, 2) if tiny else self.rows
        settings = {
            "model_name_or_path": str(folder),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": self.layers,
            "max_length": self.length,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": STEPS,
            "num_train_epochs": 100.0,
        }
        return from_values({**settings, **usual, **self.more, **small})


FP4, LORA = {"bnb_4bit_quant_type": "fp4"}, {"method": "lora"}
PLAIN, EIGHT = {"optim": "adamw_torch"}, {"optim": "adamw_8bit"}
EAGER = {"attn_implementation": "eager"}

CASES: tuple[Case, ...] = (
    Case(QWEN05, 1, 512, "true", saved=True),
    Case(QWEN05, 8, 1024, "false", {"lora_r": 64}),
    Case(QWEN05, 16, 512, "12", PLAIN),
    Case(QWEN05, 4, 4096, "true", LORA),
    Case(QWEN05, 16, 256, "false", LORA | EIGHT),
    Case(QWEN15, 4, 2048, "true", {"lora_r": 32}),
    Case(QWEN15, 2, 2048, "false", FP4),
    Case(LLAMA1, 1, 8192, "true", {}),
    Case(LLAMA1, 8, 1024, "true", {"lora_r": 64} | PLAIN, saved=True),
    Case(LLAMA1, 4, 2048, "8", LORA),
    Case(LLAMA1, 16, 256, "false", EIGHT),
    Case(LLAMA1, 2, 4096, "4", {"lora_r": 8}),
    Case(LLAMA3, 2, 2048, "14", {}),
    Case(LLAMA3, 4, 1024, "false", {"lora_r": 8}),
    Case(QWEN4, 1, 4096, "true", {}, saved=True),
    Case(QWEN4, 2, 1024, "false", {"bnb_4bit_use_double_quant": False}),
    Case(QWEN4, 4, 2048, "18", LORA),
    Case(QWEN4, 8, 512, "true", {"lora_r": 64, "optim": "adamw_8bit"}),
    Case(GEMMA2, 2, 1024, "true", EAGER),
    Case(GEMMA2, 1, 1024, "13", EAGER | LORA),
    Case(GEMMA3, 4, 2048, "true", {}),
    Case(GEMMA3, 2, 1024, "false", {"lora_r": 32} | PLAIN),
    Case(PHI35, 2, 2048, "true", {}),
    Case(PHI35, 1, 2048, "false", LORA),
    Case(SMOL3, 2, 2048, "18", FP4),
    Case(MISTRAL, 1, 2048, "true", {}),
    Case(MISTRAL, 2, 1024, "16", {"lora_r": 32}),
    Case(QWEN7, 2, 2048, "true", EIGHT),
    Case(LLAMA8, 2, 2048, "true", {}),
    Case(LLAMA8, 1, 4096, "16", {}),
    Case(LLAMA8, 1, 2048, "false", {"lora_r": 8}),
    Case(LLAMA8, 1, 1024, "true", LORA),
    Case(LLAMA8, 1, 8192, "true", {"lora_r": 64} | PLAIN),
    Case(LLAMA8, 2, 2048, "true", {"loss_chunk_size": 256}),
    Case(QWEN14, 1, 2048, "true", {}),
    Case(QWEN14, 2, 1024, "20", {"lora_r": 32}),
    Case(PHI4, 1, 2048, "true", {}),
    Case(PHI4, 4, 512, "false", {"lora_r": 8}),
)


def measure_case(case: Case, machine: Machine, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Run one configuration and return what the table needs of it."""
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
    shapes.forget_all_but_speed(machine)
    line: dict[str, Any] = {"case": case.name, "shape": case.shape, "device": machine.name, "took": round(took, 1), "saved": case.saved}
    if ran.error is not None or not ran.of(Stepped)[WARM:]:
        return line | {"error": f"{type(ran.error).__name__}: {ran.error}"[:600]}
    return line | figures(ran, run, spec, machine)


def figures(ran: Ran, run: RunConfig, spec: Any, machine: Machine) -> dict[str, Any]:
    """Return measured and predicted bytes by phase, and seconds a step."""
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
        "reserved": max(step.memory_reserved_bytes for step in steps),
        "allocated": max(step.memory_peak_bytes for step in steps),
        "seconds_predicted": per_token * late[0].tokens if per_token else None,
        "seconds_measured": statistics.median(step.seconds for step in late),
        "tokens_per_step": late[0].tokens,
    }


def run_all(out: Path, cases: Iterable[Case], *, cpu: bool, seconds: float) -> int:
    """Measure the cases that `out` does not hold yet; returns how many were left out for lack of time."""
    done = {line["case"] for line in read(out)} if out.exists() else set()
    began, left = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as home:
        shapes.use_home(Path(home))
        machine = shapes.device_of(cpu)
        for number, case in enumerate(case for case in cases if case.name not in done):
            if time.monotonic() - began > seconds:
                print(f"left out: {case.name}", flush=True)
                left += 1
                continue
            line = measure_case(case, machine, Path(home) / str(number), tiny=cpu)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(short(line), flush=True)
    return left


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
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    if options.what == "table":
        print(table(read(options.out)))
        return 0
    cases = [case for case in CASES if options.only.lower() in case.name.lower()]
    return min(1, run_all(options.out, cases, cpu=options.cpu, seconds=options.seconds))


if __name__ == "__main__":
    sys.exit(main())
