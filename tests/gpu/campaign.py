"""Everything that is measured on a card, as a queue of tasks over the cards of one host.

usage: campaign.py OUT [--cards N] [--seconds N] [--only TEXT,TEXT] [--peers DIR] [--demo DIR] [--tasks FILE] [--list]

`campaign.toml` names the tasks. Each is a process that sees one card; what it prints goes to OUT/NAME.log, what it measures to files in
OUT, and how it ended to OUT/tasks.jsonl. A task that ended well is not run again, so that a campaign that was cut off goes on when the
command is given again; most tasks then go on inside too. The longest begin first, and none begins that would likely not end within N
seconds. `--peers` is a folder with the peers' packages, `--demo` the checkpoint that the gate of the 8-bit base trains on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = "{python} -m tests.bench.step --model {out}/models --each 330"


@dataclass(frozen=True, slots=True)
class Task:
    """One process: what it is called, how long it takes, and the words of its command."""

    name: str
    seconds: float
    words: tuple[str, ...]


def read_tasks(path: Path, given: Mapping[str, str]) -> tuple[list[Task], list[str]]:
    """Return the tasks of a file, the longest first, and the names of those that need something that was not `given`."""
    tasks, without = list[Task](), list[str]()
    for name, told in tomllib.loads(path.read_text()).items():
        words = [word for part in shlex.split(told["command"]) for word in (shlex.split(BENCH) if part == "{bench}" else [part])]
        if any("{" + key + "}" in word and not value for word in words for key, value in given.items()):
            without.append(name)
            continue
        tasks.append(Task(name, told["seconds"], tuple(word.format_map(given) for word in words)))
    return sorted(tasks, key=lambda task: -task.seconds), without


class Campaign:
    """The tasks that are left, and who works on them."""

    def __init__(self, out: Path, tasks: list[Task], seconds: float) -> None:
        self.out, self.left, self.until = out, list(tasks), time.monotonic() + seconds
        self.lock = threading.Lock()

    def take(self) -> Task | None:
        """Return the longest task that still has time to end."""
        with self.lock:
            room = self.until - time.monotonic()
            task = next((task for task in self.left if task.seconds <= room), None)
            if task is not None:
                self.left.remove(task)
            return task

    def work(self, card: str) -> None:
        """Do one task after the other on a card."""
        while (task := self.take()) is not None:
            self.say(f"{task.name} begins on card {card}")
            own = {"CUDA_VISIBLE_DEVICES": card, "PYTHONUNBUFFERED": "1", "UNSLOTH_COMPILE_LOCATION": str(self.out / f"compiled-{card}")}
            began = time.monotonic()
            with (self.out / f"{task.name}.log").open("ab") as log:
                code = subprocess.run(task.words, cwd=ROOT, env=os.environ | own, stdout=log, stderr=log, check=False).returncode
            told = {"task": task.name, "card": card, "exit": code, "seconds": round(time.monotonic() - began, 1)}
            with self.lock, (self.out / "tasks.jsonl").open("a") as file:
                file.write(json.dumps(told) + "\n")
            self.say(f"{task.name} ended with {code} after {told['seconds']} s")

    def say(self, words: str) -> None:
        """Print a line whole, whoever else prints."""
        with self.lock:
            print(words, flush=True)


def ended_well(out: Path) -> set[str]:
    """Return the tasks that need not be run again."""
    path = out / "tasks.jsonl"
    told: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["task"] for line in told if line["exit"] == 0}


def main(words: list[str]) -> int:
    """Read the command line and work until nothing is left that fits the time; 75 if something was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", default="")
    parser.add_argument("--demo", default="")
    parser.add_argument("--tasks", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    options = parser.parse_args(words)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = {"out": str(out), "python": sys.executable, "peers": options.peers, "demo": options.demo}
    tasks, without = read_tasks(options.tasks, given)
    done, wanted = ended_well(out), options.only.split(",")
    tasks = [task for task in tasks if task.name not in done and any(text in task.name for text in wanted)]
    for name in without:
        print(f"left out: {name}: it needs --peers or --demo", flush=True)
    if options.list:
        print("\n".join(f"{task.name}, {task.seconds} s: {shlex.join(task.words)}" for task in tasks))
        return 0
    campaign = Campaign(out, tasks, options.seconds)
    workers = [threading.Thread(target=campaign.work, args=(str(card),)) for card in range(options.cards)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for task in campaign.left:
        print(f"left out: {task.name}: {options.seconds:g} s are too short for it", flush=True)
    return os.EX_TEMPFAIL if campaign.left else int(not {task.name for task in tasks} <= ended_well(out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
