"""Record the real loss traces of `traces/`: short runs of the product itself, healthy and made ill on purpose.

    python tests/watch/make_traces.py                # all of them, about twenty minutes on one core
    python tests/watch/make_traces.py spike-b4 ...   # these

The watch is switched off while ill runs are recorded, so that an ill run shows what it would have become. The tiny model is a random
two-layer Llama over bytes; `demo-*` train the demo's SmolLM2-135M. `traces/README.md` says how each was made.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "loop")]

import torch  # noqa: E402
from conftest import write_model, write_tokenizer  # noqa: E402
from loop_driver import drive  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from qlora_tui.engine import batches  # noqa: E402
from qlora_tui.engine.data.builtin_docs import read_docs  # noqa: E402
from qlora_tui.engine.errors import Diverged  # noqa: E402
from qlora_tui.engine.evaluate import read_rows  # noqa: E402
from qlora_tui.engine.events import Evaluated, Stepped  # noqa: E402
from qlora_tui.engine.spec import RunConfig, from_values  # noqa: E402
from qlora_tui.engine.train.step import Gradient  # noqa: E402
from qlora_tui.engine.watch import Watch  # noqa: E402

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "eval_loss", "eval_rows", "rows")
RATE = 3e-3
"""A healthy rate for the tiny model; thirty times as much is the ill one."""

Row = dict[str, str]
Fault = Callable[[], Any]


@dataclass(frozen=True)
class Recipe:
    """How one trace is made: settings of the run, what becomes of its rows, and what is broken while it trains."""

    batch: int
    steps: int = 400
    settings: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[list[Row]], list[Row]] = lambda rows: rows
    fault: Fault | None = None
    keep_rows: bool = False
    demo: bool = False
    watched: bool = False


def shuffled(rows: list[Row]) -> list[Row]:
    """Give every question somebody else's answer."""
    answers = [row["answer"] for row in rows]
    random.Random(1).shuffle(answers)
    return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


def noise(rows: list[Row]) -> list[Row]:
    """Answer with random letters: nothing to learn, but a small set can be learnt by heart."""
    letters = random.Random(2)
    return [{**row, "answer": "".join(letters.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=60))} for row in rows]


def poisoned(rows: list[Row]) -> list[Row]:
    """Make three in a hundred answers a broken encoding."""
    letters = random.Random(3)
    ill = set(letters.sample(range(len(rows)), len(rows) * 3 // 100))
    garbage = "".join(chr(code) for code in range(0x4E00, 0x4F00))
    return [{**row, "answer": "".join(letters.choices(garbage, k=80))} if at in ill else row for at, row in enumerate(rows)]


def second_source(rows: list[Row]) -> list[Row]:
    """Make the second half of the rows another kind: tables of numbers."""
    digits = random.Random(4)
    half = len(rows) // 2
    other = [{"question": "table", "answer": " ".join(f"{digits.random():.3f}" for _ in range(25))} for _ in rows[half:]]
    return rows[:half] + other


@contextmanager
def in_order(key: Callable[[int, list[int]], Any]) -> Iterator[None]:
    """Take rows in the order of `key` instead of shuffled."""

    def order(lengths: Any, rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
        places = sorted(range(len(lengths)), key=lambda place: key(place, list(lengths)))
        return [places[at : at + rows_per_step] for at in range(0, len(places), rows_per_step)]

    with mock.patch.object(batches, "epoch_order", order):
        yield


def by_length() -> Any:
    """Sort by length, shortest first: a curriculum, and a saw tooth at every epoch."""
    lengths: dict[int, int] = {}

    def key(place: int, all_lengths: list[int]) -> int:
        if not lengths:
            lengths.update(enumerate(all_lengths))
        return lengths[place]

    return in_order(key)


def as_given() -> Any:
    """Keep the order of the file."""
    return in_order(lambda place, _: place)


@contextmanager
def half_precision() -> Iterator[None]:
    """Send gradients through float16 under a loss scale that doubles every 20 steps and never comes down again."""
    real = Gradient.of_step

    def of_step(self: Gradient, rows: Any, supervised: int, step: int) -> Any:
        done = real(self, rows, supervised, step)
        scale = 2.0 ** (8 + step // 20)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = (parameter.grad * scale).half().float() / scale
        return done

    with mock.patch.object(Gradient, "of_step", of_step):
        yield


HEALTHY = ((1, 1000, RATE / 3), (4, 1000, RATE), (16, 250, RATE))
"""Rows a step, steps and rate; a thousand steps of 16 would be twenty epochs, and overfit."""
WATCHED = {"watch_stop": ("spike", "drift")}
"""Changes of the data are recorded under the watch, so that the trace holds the measurements that it asks for."""
ILL = {"learning_rate": RATE * 30}
RECIPES: dict[str, Recipe] = {
    **{
        f"healthy-b{batch}-{seed}": Recipe(batch, steps, {"seed": seed, "learning_rate": rate})
        for batch, steps, rate in HEALTHY
        for seed in (1, 2)
    },
    **{f"rate-b{batch}": Recipe(batch, 400, {**ILL}) for batch in (1, 4, 16)},
    "rate-late-b4": Recipe(4, 400, {**ILL, "warmup_steps": 200.0, "lr_scheduler_type": "constant"}),
    "shuffled-b4": Recipe(4, 600, {"max_samples": 160}, shuffled),
    "noise-b4": Recipe(4, 600, {"max_samples": 120}, noise),
    "overflow-b4": Recipe(4, 400, {}, fault=half_precision),
    "poisoned-b1": Recipe(1, 600, {}, poisoned, keep_rows=True),
    "poisoned-b4": Recipe(4, 600, {}, poisoned, keep_rows=True),
    "overfit-b4": Recipe(4, 600, {"max_samples": 64, "lora_r": 64, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}),
    "no-holdout-b4": Recipe(4, 600, {"max_samples": 40, "val_set_size": 0.0, "lora_r": 64, "learning_rate": 1e-2}),
    "frozen-b4": Recipe(4, 500, {"learning_rate": 1e-9}),
    "sorted-b4": Recipe(4, 600, WATCHED, fault=by_length, watched=True),
    "sorted-b1": Recipe(1, 600, {**WATCHED, "max_samples": 300, "learning_rate": RATE / 3}, fault=by_length, watched=True),
    "new-source-b4": Recipe(4, 600, WATCHED, second_source, as_given, watched=True),
    "new-source-b16": Recipe(16, 200, WATCHED, second_source, as_given, watched=True),
    "demo-healthy-b4": Recipe(4, 60, {"learning_rate": 5e-4}, demo=True),
    "demo-healthy-b1": Recipe(1, 120, {"learning_rate": 2e-4}, demo=True),
    "demo-rate-b4": Recipe(4, 40, {"learning_rate": 5e-4 * 30}, demo=True),
}


def model_folder(home: Path, demo: bool) -> Path:
    """Return the folder of the tiny model, or of the demo's."""
    if demo:
        from qlora_tui.engine import builtin

        return builtin.fetch(lambda done, total: None, lambda: False)
    folder = Path(tempfile.gettempdir()) / f"qlora-tui-traces-{os.getuid()}"
    if not (folder / "taught").exists():
        write_model(folder, hidden_size=96, intermediate_size=192)
        write_tokenizer(folder)
        teach(folder)
        (folder / "taught").touch()
    return folder


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of `text` alone."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def teach(folder: Path) -> None:
    """Train all of the tiny model on half of the rows for a minute or two, so that what follows is fine-tuning and not a first lesson."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encode = partial(encoded, Tokenizer.from_file(str(folder / "tokenizer.json")))
    start, end = 257, 258  # of a turn, in the tests' tokenizer
    tokens: list[int] = []
    for row in list(map(question_and_answer, read_docs()))[::2]:
        turns = ("user\n" + row["question"], "assistant\n" + row["answer"])
        tokens += [token for turn in turns for token in (start, *encode(turn), end, *encode("\n"))]
    every = torch.tensor(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(900):
        starts = torch.randint(0, len(every) - 161, (16,))
        ids = torch.stack([every[at : at + 160] for at in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"the tiny model was taught to {float(loss):.2f} nats a byte", flush=True)
    model.save_pretrained(folder)


def run_of(recipe: Recipe, home: Path) -> RunConfig:
    """Write the rows and return the run."""
    data = home / "rows.jsonl"
    found = [question_and_answer(row) for row in list(read_docs())[1::2]]
    chosen = random.Random(5).sample(found, min(len(found), int(recipe.settings.get("max_samples", 1300))))
    data.write_text("".join(json.dumps(row) + "\n" for row in recipe.rows(chosen)))
    values = {
        "model_name_or_path": str(model_folder(home, recipe.demo)),
        "data": (str(data),),
        "method": "lora",
        "max_length": 256,
        "too_long": "cut",
        "val_set_size": 24.0,
        "per_device_train_batch_size": recipe.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": recipe.steps,
        "learning_rate": RATE,
        "eval_steps": max(10, recipe.steps // 12),
        "save_steps": 10**6,
        "gradient_checkpointing": "false",
    }
    return from_values(values | {name: value for name, value in recipe.settings.items() if name != "max_samples"})


def question_and_answer(row: Any, longest: int = 100) -> Row:
    """Return a short row of the demo's data."""
    question, answer = (turn["content"] for turn in row["messages"])
    return {"question": question, "answer": answer[:longest]}


def record(name: str, recipe: Recipe) -> None:
    """Run one recipe and write its trace."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        if not recipe.watched:
            stack.enter_context(mock.patch.object(Watch, "see", return_value=[]))
            stack.enter_context(mock.patch.object(Watch, "measured", return_value=[]))
        if recipe.fault is not None:
            stack.enter_context(recipe.fault())
        home = Path(place)
        run = run_of(recipe, home)
        ran = drive(run, home / "run")
        if ran.error is not None and not isinstance(ran.error, Diverged):
            raise ran.error
        lines = [line for event in ran.events if (line := line_of(event, home / "run", recipe)) is not None]
    with (HERE / "traces" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(name, len(lines), "lines", flush=True)


def line_of(event: Any, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the line of a step or of a measurement."""
    if isinstance(event, Evaluated):
        rows = " ".join(f"{row.mean:.4f}" for row in read_rows(folder / event.path))
        return {"step": event.step, "eval_loss": f"{event.loss:.4f}", "eval_rows": rows}
    if not isinstance(event, Stepped):
        return None
    return {
        "step": event.step,
        "loss": f"{event.loss:.5g}",
        "grad_norm": f"{event.grad_norm:.4g}",
        "learning_rate": f"{event.lr:.4g}",
        "epoch": f"{event.epoch:.3f}",
        "tokens": event.tokens,
        "rows": " ".join(map(str, event.rows)) if recipe.keep_rows else "",
    }


def main(names: list[str]) -> None:
    """Record the named traces, or all."""
    torch.set_num_threads(1)
    (HERE / "traces").mkdir(exist_ok=True)
    for name in names or RECIPES:
        record(name, RECIPES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
