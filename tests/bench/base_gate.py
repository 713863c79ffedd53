"""Whether an 8-bit base learns as well as a 16-bit one: held-out loss after 200 steps over three seeds, beside NF4.

usage: python -m tests.bench.base_gate --model FOLDER --out OUT.jsonl [--gpu] [--seconds N] [--methods ...] [--seeds ...] [--steps N]

FOLDER is a checkpoint with its tokenizer, such as the demo's model; nothing is fetched. The rows are the demo's: documentation of the
running Python, of which the same part is held out in every run. One JSON line a run is added to OUT.jsonl, and runs that are in it
already are not done again; `--seconds` starts no run that would likely end later. Then the table and the verdict are printed.

On `lora-8bit` gradients are multiplied in what the device is fastest at; on `lora-int8` in 16 bits on any device, and on
`lora-int8-gradients` in INT8, as on Ampere.

The verdict: an 8-bit base is good enough if its loss is above the 16-bit base's by no more than what another seed changes there (the
standard deviation over seeds), and below NF4's with every seed. `engine/onebyte.py` names what passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests"), str(ROOT / "tests/loop"), str(ROOT / "tests/gpu")]

METHODS = ("lora", "lora-8bit", "lora-int8", "lora-int8-gradients", "qlora")
GPU_ALONE = {"lora-int8": "16bit", "lora-int8-gradients": "int8"}
"""What gradients on an 8-bit base are multiplied in where that is not the usual of the card."""
STEPS, ROWS, HELD = 200, 8, 200
SAME = ("device", "torch", "rows", "steps", "learning_rate")
"""What lines must have in common to be compared."""

Line = Mapping[str, Any]


def write_rows(folder: Path, steps: int, held: int) -> tuple[Path, Path, str]:
    """Write the rows to train on and those held out, and return both files and what tells these rows from others."""
    from qlora_tui.engine.data import builtin_docs

    rows = list(builtin_docs.read_docs())
    random.Random(0).shuffle(rows)
    paths = folder / "train.jsonl", folder / "held.jsonl"
    for path, part in zip(paths, (rows[held : held + steps * ROWS], rows[:held]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return *paths, hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def one(method: str, seed: int, files: tuple[Path, Path], asked: argparse.Namespace, folder: Path, machine: Any) -> dict[str, Any]:
    """Train once and return what came out."""
    from loop_driver import drive

    from qlora_tui.engine.events import Evaluated, Stepped
    from qlora_tui.engine.spec import from_values

    run = from_values(
        {
            "model_name_or_path": str(asked.model),
            "method": "lora-8bit" if method in GPU_ALONE else method,
            "grad_matmul": GPU_ALONE.get(method, "auto"),
            "data": (str(files[0]),),
            "eval_data": str(files[1]),
            "max_length": 512,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": 1,
            "max_steps": asked.steps,
            "num_train_epochs": 1000.0,
            "learning_rate": asked.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "optim": "adamw_torch",
            "seed": seed,
            "gradient_checkpointing": "false",
            "eval_steps": asked.steps,
            "save_steps": asked.steps,
            "final_checks": False,
        }
    )
    ran = drive(run, folder, machine=machine)
    if ran.error is not None:
        raise ran.error
    steps, measured = ran.of(Stepped), ran.of(Evaluated)
    if len(steps) != asked.steps or measured[-1].step != asked.steps:
        raise SystemExit(f"{method}, seed {seed}: {len(steps)} of {asked.steps} steps were made")
    return {
        "before": measured[0].loss,
        "held_out": measured[-1].loss,
        "last_loss": steps[-1].loss,
        "step_seconds": statistics.median(step.seconds for step in steps),
        "memory_peak_bytes": max(step.memory_peak_bytes for step in steps),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an earlier call; one that was cut off counts for nothing."""
    found = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def add(path: Path, line: Line) -> None:
    """Add a line; what was cut off before it stays a line of its own."""
    cut = path.is_file() and not path.read_text().endswith("\n")
    with path.open("a") as out:
        out.write("\n" * cut + json.dumps(line) + "\n")


def losses(lines: Iterable[Line], method: str) -> dict[int, float]:
    """Return the held-out loss of each seed of `method`."""
    return {line["seed"]: line["held_out"] for line in lines if line["method"] == method}


def table(lines: Sequence[Line]) -> str:
    """Return the methods side by side: the loss of the untouched base, what was learned, its spread over seeds, and time."""
    rows = ["| base | untouched | held out, mean | over seeds | each seed | s a step |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        mine = [line for line in lines if line["method"] == method]
        if not mine:
            continue
        found = losses(mine, method)
        spread = f"{statistics.stdev(found.values()):.4f}" if len(found) > 1 else ""
        each = ", ".join(f"{found[seed]:.4f}" for seed in sorted(found))
        before, seconds = (statistics.fmean(line[name] for line in mine) for name in ("before", "step_seconds"))
        rows.append(f"| {mine[0]['held_as']} | {before:.4f} | {statistics.fmean(found.values()):.4f} | {spread} | {each} | {seconds:.3f} |")
    return "\n".join(rows)


def verdict(lines: Sequence[Line], method: str, seeds: Sequence[int]) -> str:
    """Return whether `method` is good enough, and by how much; or what is missing to tell."""
    ours, whole, four = ({seed: loss for seed, loss in losses(lines, name).items() if seed in seeds} for name in (method, "lora", "qlora"))
    if missing := sum(len(seeds) - len(found) for found in (ours, whole, four)):
        return f"{method}: not known yet, {missing} runs are missing"
    if len(seeds) < 2:
        return f"{method}: not known, one seed has no spread"
    worse = statistics.fmean(ours[seed] - whole[seed] for seed in seeds)
    noise = statistics.stdev(whole[seed] for seed in seeds)
    better = [four[seed] - ours[seed] for seed in seeds]
    passed = worse <= noise and min(better) > 0
    kind = next(line["held_as"] for line in lines if line["method"] == method)
    told = f"{worse:+.4f} nats from 16 bits, where another seed changes {noise:.4f}; {statistics.fmean(better):+.4f} below NF4"
    return f"{kind}: {'good enough' if passed else 'NOT good enough'}: {told} ({min(better):+.4f} with the worst seed)"


def label(method: str, asked: argparse.Namespace, machine: Any) -> str:
    """Return what a base is held in, in words, and whether gradients are multiplied in 8 bits too."""
    from qlora_tui.engine.models import from_folder
    from qlora_tui.engine.onebyte import narrow_gradients
    from qlora_tui.engine.spec import from_values

    if method in ("lora", "qlora"):
        return "NF4, double quantized" if method == "qlora" else "16 bits" if machine.bf16 else "32 bits"
    run = from_values({"method": "lora-8bit", "grad_matmul": GPU_ALONE.get(method, "auto")})
    kind = narrow_gradients(from_folder(asked.model), run, machine)
    return f"INT8, gradients in {kind.upper()}" if kind else "INT8"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--held", type=int, default=HELD)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    asked = parser.parse_args(given)
    asked.methods = asked.methods or [method for method in METHODS if asked.gpu or method not in GPU_ALONE]
    return asked


def main(given: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, seed by seed, and print what is known."""
    began, asked = time.monotonic(), arguments(given)
    import shapes
    import torch

    if asked.gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: without --gpu the same runs are made on the processor")
    with tempfile.TemporaryDirectory() as home:
        shapes.use_home(Path(home))
        machine = shapes.device_of(not asked.gpu)
        *files, rows = write_rows(Path(home), asked.steps, asked.held)
        name = torch.cuda.get_device_name() if asked.gpu else "CPU"
        same = dict(zip(SAME, (name, torch.__version__, rows, asked.steps, asked.learning_rate), strict=True))
        done = [line for line in read(asked.out) if all(line[key] == value for key, value in same.items())]
        longest = 0.0
        for seed in asked.seeds:
            for method in asked.methods:
                if seed in losses(done, method) or time.monotonic() - began + longest > asked.seconds:
                    continue
                start = time.monotonic()
                made = one(method, seed, (files[0], files[1]), asked, Path(home) / f"{method}-{seed}", machine)
                longest = max(longest, time.monotonic() - start)
                line = {"method": method, "held_as": label(method, asked, machine), "seed": seed, **made, **same}
                done.append(line)
                print(json.dumps(line), flush=True)
                add(asked.out, line)
    print(table(done))
    for method in asked.methods:
        if method not in ("lora", "qlora"):
            print(verdict(done, method, asked.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
