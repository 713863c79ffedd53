"""Time reading, rendering, tokenizing and splitting of many rows, beside `datasets.map` with the same tokenizer.

usage: python tests/bench/prepare.py MODEL_FOLDER [ROWS [WORDS [WAYS]]]

Writes ROWS chats (default 1,000,000) with answers of WORDS words (default 9) as JSONL, then runs each way in a process of its own:
ours is `data.load` and `data.prepare` with an empty cache (near copies searched, hold-out drawn, every answer's mask found), theirs is
`load_dataset("json")` and `map` with `apply_chat_template(tokenize=True)`, which finds no mask and no copies. WAYS is ours, theirs
or ours,theirs (default). One line of JSON each. `longest_wait` of ours is the longest time between two looks whether somebody wants
to stop, in seconds. 850,000 rows of 330 words are 2 GB. The files go to the temporary folder and are removed.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
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
_LONG = 100


def write(path: Path, rows: int, words: int = 9) -> None:
    """Write chats with answers of so many words, all different; long ones from the words of Python's own manual, as often as there."""
    from pydoc_data.topics import topics

    known = WORDS if words < _LONG else " ".join(topics.values()).split()
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            ask, reply = (" ".join(draw.choices(known, k=size)) for size in (6, words))
            turns = [{"role": "user", "content": f"{ask} {number}?"}, {"role": "assistant", "content": f"{reply} {number * 7}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(model: str, data: str) -> tuple[int, dict[str, float]]:
    """Prepare as a run does; return how many rows are used, the seconds of each half, and the longest wait of a wish to stop."""
    from qlora_tui.engine.data import load, load_tokenizer, prepare
    from qlora_tui.engine.spec import RunConfig

    looks = [time.monotonic()]
    waits = [0.0]

    def stopping() -> None:
        waits[0] = max(waits[0], time.monotonic() - looks[0])
        looks[0] = time.monotonic()

    run = RunConfig(model_name_or_path=model, data=(data,), max_length=2048)
    tokenizer = load_tokenizer(Path(model))
    began = looks[0] = time.monotonic()
    dataset = load(run, stopping=stopping)
    read = time.monotonic()
    found = prepare(run, dataset, tokenizer, stopping=stopping)
    stopping()
    told = {"load": read - began, "prepare": time.monotonic() - read, "longest_wait": waits[0]}
    return len(found.train) + len(found.holdout), {name: round(value, 2) for name, value in told.items()}


def theirs(model: str, data: str) -> tuple[int, dict[str, float]]:
    """Render and tokenize with `datasets.map`, one process, batches of a thousand."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = load_dataset("json", data_files=data, split="train", cache_dir=os.environ["QLORA_TUI_HOME"])
    mapped = found.map(lambda rows: tokenizer.apply_chat_template(rows["messages"], tokenize=True, return_dict=True), batched=True)
    return len(mapped), {}


def measure(way: str, model: str, data: str) -> None:
    """Run one way in this process and print what it took."""
    began = time.monotonic()
    rows, more = {"ours": ours, "theirs": theirs}[way](model, data)
    seconds, size = time.monotonic() - began, Path(data).stat().st_size
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = {"way": way, "rows": rows, "seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    speed = {"rows_per_second": round(rows / seconds), "mb_per_second": round(size / seconds / 1e6, 2)}
    print(json.dumps(result | speed | {"peak_mib": int(peak[1]) // 1024 if peak else None} | more), flush=True)


def main() -> None:
    """Run one way where asked, else write the rows and run both."""
    if sys.argv[1] in ("ours", "theirs"):
        measure(*sys.argv[1:4])
        return
    model, rows, words, ways = [*sys.argv[1:], *("", "1000000", "9", "ours,theirs")[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write(data, int(rows), int(words))
        print(f"{rows} rows, {data.stat().st_size / 1e6:.0f} MB", flush=True)
        for way in ways.split(","):
            environment = os.environ | {"QLORA_TUI_HOME": str(Path(folder) / way), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
            if way == "ours":
                environment["TOKENIZERS_PARALLELISM"] = "false"  # as in a run
            subprocess.run([sys.executable, __file__, way, model, str(data)], env=environment, check=True)


if __name__ == "__main__":
    main()
