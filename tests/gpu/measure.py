"""Measure a real run on this machine's GPU: random weights of a public shape, the product's own command, one JSON line.

usage: measure.py make DIR SHAPE_ID [LAYERS]            write a random-weight checkpoint of a catalogue shape
       measure.py rows FILE ROWS LENGTH                 write rows of exactly LENGTH tokens of the byte-level tokenizer
       measure.py run DIR ROWS_FILE [KEY=VALUE ...]     train through the command line, print tokens/s and peak memory

The tokenizer is byte-level (one token a byte), since nothing can be downloaded where this runs; ids stay far below the
vocabulary, which costs the same time as any other ids. Tokens/s is the median of the steps after the third.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import write_tokenizer

PROMPT = "go"
WARM = 3


def make(folder: Path, shape: str, layers: int | None) -> None:
    """Write a random bfloat16 checkpoint in the shape of a catalogue entry, made on the GPU to save minutes."""
    import torch
    from shapes import config_of  # itself a reader of this file
    from transformers import AutoModelForCausalLM

    from qlora_tui.engine.models import find

    spec = find(shape)
    if spec is None:
        raise SystemExit(f"no shape {shape} in the catalogue")
    config = config_of(dataclasses.replace(spec, num_hidden_layers=layers or spec.num_hidden_layers))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def rows(path: Path, count: int, length: int) -> None:
    """Write chats whose rendered length is exactly `length` tokens; nearly all of them are supervised."""
    frame = len("user\n") + len(PROMPT) + len("\n") + len("assistant\n") + len("\n") + 4
    with path.open("w") as file:
        for number in range(count):
            answer = f"{number:06d} " + "abcdefgh " * length
            turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer[: length - frame]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def run(model: str, data: str, settings: list[str]) -> dict[str, object]:
    """Train through the command line and return what the journal says."""
    with tempfile.TemporaryDirectory() as runs:
        flags = [part for setting in settings for part in ("--set", setting)]
        command = [
            sys.executable,
            "-m",
            "qlora_tui.tui",
            "--no-ui",
            "--json",
            "--model",
            model,
            "--data",
            data,
            "--runs-dir",
            runs,
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    steps = [event for event in events if event["type"] == "stepped"]
    result: dict[str, object] = {"settings": settings, "exit": done.returncode, "steps": len(steps)}
    if len(steps) <= WARM:
        return result | {"stderr": done.stderr[-1500:], "last": events[-1:]}
    planned = next(event for event in events if event["type"] == "planned")
    *_, load = (event for event in events if event["type"] == "phase" and event["name"] == "load" and event["peak_bytes"])
    late = steps[WARM:]
    return result | {
        "tokens_per_second": round(statistics.median(step["tokens"] / step["seconds"] for step in late)),
        "step_seconds": round(statistics.median(step["seconds"] for step in late), 4),
        "tokens_a_step": late[0]["tokens"],
        "supervised_a_step": late[0]["supervised_tokens"],
        "peak_allocated_gib": round(max(step["memory_peak_bytes"] for step in steps) / 2**30, 2),
        "reserved_gib": round(max(step["memory_reserved_bytes"] for step in steps) / 2**30, 2),
        "predicted_gib": round(planned["budget"]["total_bytes"] / 2**30, 2),
        "load_seconds": round(load["seconds"], 1),
        "load_peak_gib": round(load["peak_bytes"] / 2**30, 2),
        "losses": [round(step["loss"], 3) for step in steps if isinstance(step["loss"], float)][:: max(1, len(steps) // 5)],
        "outcome": events[-1].get("outcome"),
    }


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "make":
        make(Path(rest[0]), rest[1], int(rest[2]) if len(rest) > 2 else None)
    elif name == "rows":
        rows(Path(rest[0]), int(rest[1]), int(rest[2]))
    else:
        print("RESULT " + json.dumps(run(rest[0], rest[1], rest[2:])), flush=True)
