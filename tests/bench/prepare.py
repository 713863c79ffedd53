"""Time reading, rendering, tokenizing and splitting of many rows, beside `datasets.map` with the same tokenizer.

usage: python tests/bench/prepare.py MODEL_FOLDER [ROWS]

Writes ROWS short chats (default 1,000,000) as JSONL, then runs each way in a process of its own: ours is
`data.load` and `data.prepare` with an empty cache (near copies searched, hold-out drawn, every answer's mask found), theirs is
`load_dataset("json")` and `map` with `apply_chat_template(tokenize=True)`, which finds no mask and no copies. One line of JSON each.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".pkg"))

WORDS = [
    "the",
    "a",
    "of",
    "step",
    "model",
    "learns",
    "rate",
    "loss",
    "row",
    "token",
    "train",
    "card",
    "memory",
    "short",
    "long",
    "answer",
    "question",
    "why",
    "how",
    "value",
]


def write(path: Path, rows: int) -> None:
    """Write short chats: about 15 words each, all different."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            ask, reply = (" ".join(draw.choices(WORDS, k=size)) for size in (6, 9))
            turns = [{"role": "user", "content": f"{ask} {number}?"}, {"role": "assistant", "content": f"{reply} {number * 7}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(model: str, data: str) -> int:
    """Prepare as a run does and return how many rows are trained on."""
    from qlora_tui.engine.data import load, load_tokenizer, prepare
    from qlora_tui.engine.spec import RunConfig

    run = RunConfig(model_name_or_path=model, data=(data,), max_length=512)
    return len(prepare(run, load(run), load_tokenizer(Path(model))).train)


def theirs(model: str, data: str) -> int:
    """Render and tokenize with `datasets.map`, one process, batches of a thousand."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = load_dataset("json", data_files=data, split="train", cache_dir=os.environ["QLORA_TUI_HOME"])
    mapped = found.map(lambda rows: tokenizer.apply_chat_template(rows["messages"], tokenize=True, return_dict=True), batched=True)
    return len(mapped)


def main() -> None:
    """Run one way where asked, else write the rows and run both."""
    if sys.argv[1] in ("ours", "theirs"):
        began = time.monotonic()
        rows = {"ours": ours, "theirs": theirs}[sys.argv[1]](*sys.argv[2:4])
        seconds, size = time.monotonic() - began, Path(sys.argv[3]).stat().st_size
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        result = {"way": sys.argv[1], "rows": rows, "seconds": round(seconds, 1), "rows_per_second": round(rows / seconds)}
        print(json.dumps(result | {"mb_per_second": round(size / seconds / 1e6, 2), "peak_mib": int(peak[1]) // 1024 if peak else None}))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write(data, int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
        for way in ("ours", "theirs"):
            environment = os.environ | {"QLORA_TUI_HOME": str(Path(folder) / way), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
            subprocess.run([sys.executable, __file__, way, sys.argv[1], str(data)], env=environment, check=True)


if __name__ == "__main__":
    main()
