"""Rows that put the scorecard to the test: answers that say nothing, and too few rows for too many passes.

    python tests/bench/labels.py FOLDER

writes into FOLDER

- `codes.jsonl`: after three examples, a code of four digits whose "answer" is another row's: nothing to learn but how such answers look,
- `docs_shuffled.jsonl`: the demo's rows, each with the answer of another row: the manner of the answers can be learned, the content not,
- `forty.jsonl`: 64 of the demo's short rows; 24 are to be held out and 40 trained on, 20 times,
- `docs.jsonl`: all of the demo's rows by number, for `bare_peft.py`.

The runs, all with the demo's preset:

    qlora-tui demo --no-ui
    qlora-tui --no-ui --preset demo --data FOLDER/codes.jsonl
    qlora-tui --no-ui --preset demo --data FOLDER/docs_shuffled.jsonl --max-steps 15 --set eval_steps=15
    qlora-tui --no-ui --preset demo --data FOLDER/forty.jsonl --set val_set_size=24 --set num_train_epochs=20 --set max_steps=0 \
        --set eval_steps=20 --set save_steps=50
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from qlora_tui.engine.data.builtin_docs import read_docs

ROWS, SHOTS, SHORT = 264, 3, 220


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    docs: list[dict[str, Any]] = [dict(row) for row in read_docs()]
    write(folder / "docs.jsonl", docs)
    draw = random.Random(7)
    draw.shuffle(docs)
    write(folder / "docs_shuffled.jsonl", mixed(docs[:ROWS]))
    write(folder / "forty.jsonl", [row for row in docs if len(row["messages"][1]["content"]) <= SHORT][:64])
    write(folder / "codes.jsonl", codes(draw))


def mixed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `rows`, each with the answer of another."""
    answers = [row["messages"][1] for row in rows]
    random.Random(1).shuffle(answers)
    return [{"messages": [row["messages"][0], answer]} for row, answer in zip(rows, answers, strict=True)]


def codes(draw: random.Random) -> list[dict[str, Any]]:
    """Return rows that end in a code which follows from nothing before it."""

    def code() -> str:
        return "".join(draw.choices("0123456789", k=4))

    answers = [f" {code()}\n" for _ in range(ROWS)]
    draw.shuffle(answers)
    asked = ["".join(f"{code()} -> {code()}\n" for _ in range(SHOTS)) + f"{code()} ->" for _ in range(ROWS)]
    return [
        {"segments": [{"text": text, "label": False}, {"text": answer, "label": True}]} for text, answer in zip(asked, answers, strict=True)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
