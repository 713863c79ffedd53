"""A training step of ours and of the peers side by side on one card: same shapes, same rows, each in a process of its own.

usage: python -m tests.bench.step --workload a|b|c|d|length|long --out FILE.jsonl [--only ours,unsloth] [--settings full,none,auto]
           [--limit GIB] [--lengths N ...] [--seconds N] [--each N] [--model DIR] [--method lora-8bit] [--gradients int8] [--older]
           [--sixteen] [--peers DIR] [--profile] [--cpu]
       python -m tests.bench.step --table FILE.jsonl

Lines are appended as they come; a case that FILE holds is not run again, one that would begin after N seconds is named and left
out. Peers load one quantized checkpoint of random weights, written to DIR if nothing is there; with `--sixteen` it is in bfloat16
and ours loads it too, else ours makes its base on the card. `--peers` is a folder with the peers' packages. `--cpu` runs the same
code on tiny shapes and measures nothing. The order of rows and the learning rate differ between backends; neither changes the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.kernel_time import table as profile_table
from tests.bench.workloads import GIB, WORKLOADS, Case, cases, longest, next_try, write_rows

ROOT = Path(__file__).resolve().parents[2]
GRAIN, MOST = 256, 1 << 20
Line = dict[str, Any]


def read(out: Path) -> list[Line]:
    """Return the lines of a file of results; a line that a kill cut off at the end is no line."""
    if not out.exists():
        return []
    return [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append(out: Path, line: Line) -> None:
    """Add a line and have it on disk before the next case begins; the rest of a line that a kill cut off goes first."""
    if out.exists() and not out.read_bytes().endswith(b"\n"):
        whole = out.read_bytes()
        out.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Bench:
    """What one call measures, into `out`; `ask` starts a process and returns what it told, or None when it took too long."""

    def __init__(self, options: argparse.Namespace, work: Path, ask: Callable[[list[str], float], Line | None]) -> None:
        self.options, self.work, self.ask = options, work, ask
        self.out: Path = options.out
        self.began = time.monotonic()
        self.done = {line["key"]: line for line in read(self.out) if "key" in line}
        self.models = Path(options.model or work / "models")
        self.head: Line = {}

    def begin(self) -> None:
        """Measure the card's ceiling and write the header of this call."""
        told = self.ask(["ceiling"], self.options.each)
        if told is None:
            raise SystemExit("the ceiling could not be measured within the time of a case")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.head = told | {"date": date, "command": "python -m tests.bench.step " + " ".join(self.options.words)}
        append(self.out, self.head)
        print(f"{told['device']}, ceiling {told['ceiling'] / 1e12:.0f} TFLOP/s", flush=True)

    def one(self, case: Case) -> Line | None:
        """Return the result of a case, from `out` or measured now; None if it was left out."""
        if case.key in self.done:
            return self.done[case.key]
        if case.package and importlib.util.find_spec(case.package) is None:
            print(f"skipped: {case.key}: {case.package} is not installed", flush=True)
            return None
        if time.monotonic() - self.began > self.options.seconds:
            print(f"left out: {case.key}: {self.options.seconds:g} s are over", flush=True)
            return None
        if not self.head:
            self.begin()
        text = json.dumps(dataclasses.asdict(case))
        model = self.checkpoint(case)
        data = self.work / "rows.jsonl"
        write_rows(case, data)
        told = self.ask(["run", text, str(model), str(data)], self.options.each)
        if told is None:
            print(f"ended: {case.key}: not done after {self.options.each:g} s", flush=True)
            return None
        line = {"key": case.key, **dataclasses.asdict(case), "device_name": self.head["device"], "ceiling": self.head["ceiling"], **told}
        self.done[case.key] = line
        if "error" not in line:  # an error is no result: it is tried again
            append(self.out, line)
        print(short(line), flush=True)
        if "times" in line:
            print(json.dumps(line["times"]), flush=True)
        return line

    def checkpoint(self, case: Case) -> Path:
        """Return the folder of the checkpoint that all backends share, written where one is needed and there is none."""
        kind = "bf16" if case.sixteen else "nf4"
        folder = self.models / f"{case.shape.split('/')[-1]}-{kind}{'-tiny' if case.tiny else ''}"
        if folder.exists() or (case.backend == "ours" and not case.sixteen):
            return folder
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # what is cut off is not taken for a checkpoint
        words = ["make", json.dumps(dataclasses.asdict(case)), str(part)]
        if self.ask(words, self.options.each) is None:
            raise SystemExit(f"the checkpoint could not be written within {self.options.each:g} s")
        try:
            return part.rename(folder)
        except OSError:  # another bench was first
            shutil.rmtree(part)
            return folder

    def try_each(self, case: Case) -> None:
        """Try the lengths that were asked for, shortest first, until one does not train."""
        for length in sorted(self.options.lengths):
            line = self.one(dataclasses.replace(case, length=length))
            if line is None or "error" in line or "out_of_memory" in line:
                return

    def search(self, case: Case) -> None:
        """Find the longest row that trains; what was tried before is in `out`."""
        grain, most = (16, 128) if case.tiny else (GRAIN, MOST)
        start = max(grain, min(self.options.start, most) // grain * grain)
        tried: dict[int, bool] = {}
        while (length := next_try(tried, start=start, grain=grain, most=most, near=self.options.near)) is not None:
            line = self.one(dataclasses.replace(case, length=length))
            if line is None or "error" in line:
                print(f"{case.backend} {case.setting}, {case.limit:g} GiB: not finished, {longest(tried):,} tokens so far", flush=True)
                return
            tried[length] = "out_of_memory" not in line
        print(f"{case.backend} {case.setting}, {case.limit:g} GiB: the longest row that trains has {longest(tried):,} tokens", flush=True)


def short(line: Line) -> str:
    """Return one line for whoever watches."""
    if "error" in line or "out_of_memory" in line:
        return f"{line['key']}: {line.get('error') or line['out_of_memory']}"
    share, data = line["flops"] / line["ceiling"], f", {line['data_share']:.2%} of a step on batches" if "data_share" in line else ""
    speed = f"{line['tokens_per_second']:,.0f} tokens/s, {share:.0%} of the ceiling"
    return f"{line['key']}: {speed}, {line['reserved'] / GIB:.2f} GiB reserved{data}"


def table(lines: list[Line]) -> str:
    """Return header and results as Markdown; the longest row of each kind is told below."""
    rows = [
        f"- {line['date']}, {line['device']}, torch {line['torch']}, {line['ceiling'] / 1e12:.0f} TFLOP/s: `{line['command']}`"
        for line in lines
        if "command" in line
    ]
    names = ["workload", "backend", "recomputed", "limit", "longest row", "step", "tokens/s", "supervised/s", "of the ceiling"]
    rows += ["", "| " + " | ".join([*names, "allocated", "reserved", "device"]) + " |", "|---" * 12 + "|"]
    results = [line for line in lines if "key" in line]
    rows += [row_of(line) for line in results]
    tried: dict[tuple[str, str, float], dict[int, bool]] = {}
    for line in results:
        if line["workload"] == "long":
            tried.setdefault((line["backend"], line["setting"], line["limit"]), {})[line["length"]] = "out_of_memory" not in line
    rows += [""] + [f"- longest row, {name} {how}, {limit:g} GiB: {longest(found):,} tokens" for (name, how, limit), found in tried.items()]
    for line in results:
        if "times" in line:
            rows += ["", f"{line['key']}:", "", profile_table(line["times"])]
    return "\n".join(rows).strip()


def row_of(line: Line) -> str:
    """Return one result as a row of the table."""
    limit = f"{line['limit']:g} GiB" if line["limit"] else ""
    held = "" if line.get("method", "qlora") == "qlora" else line["method"]
    gradients = line.get("gradients", "auto").replace("auto", "")
    backend = " ".join(filter(None, (line["backend"], line["packing"], held, gradients, "older" * line.get("older", False))))
    cells = [line["workload"], backend, line["setting"], limit, f"{line['length']:,}"]
    if "out_of_memory" in line:
        return "| " + " | ".join([*cells, "out of memory", *[""] * 6]) + " |"
    middle = sorted(line["seconds"])[len(line["seconds"]) // 2]
    cells += [f"{middle:.3f} s", f"{line['tokens_per_second']:,.0f}", f"{line['supervised_per_second']:,.0f}"]
    cells += [f"{line['flops'] / line['ceiling']:.1%}", *(f"{line[name] / GIB:.2f} GiB" for name in ("allocated", "reserved", "device"))]
    return "| " + " | ".join(cells) + " |"


def asker(options: argparse.Namespace) -> Callable[[list[str], float], Line | None]:
    """Return how a process is started: from the repository root, with the peers' folder on its path."""
    path = [str(ROOT / ".pkg"), *([options.peers] if options.peers else []), os.environ.get("PYTHONPATH", "")]
    settled = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | settled | {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def ask(words: list[str], seconds: float) -> Line | None:
        command = [sys.executable, "-m", "tests.bench.one", *words, *(["--cpu"] if options.cpu else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT, env=environment)
        except subprocess.TimeoutExpired:
            return None
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if found:
            return dict(json.loads(found[-1].removeprefix("RESULT ")))
        if words[0] != "run":
            raise SystemExit(f"{words[0]} failed: {done.stderr[-1500:]}")
        return {"error": f"ended with {done.returncode}: {done.stderr[-1500:]}"}

    return ask


def options_of(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="a")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print a file of results as Markdown, and measure nothing")
    parser.add_argument("--only", default="", help="backends, with commas; empty: all")
    parser.add_argument("--settings", default="", help="full, offloaded, none, auto (the planner's choice), with commas; empty: all")
    parser.add_argument("--limit", type=float, default=0.0, help="GiB that a process may use; 0: all")
    parser.add_argument("--seconds", type=float, default=500.0, help="no case begins after so many")
    parser.add_argument("--each", type=float, default=330.0, help="seconds that a process may take")
    parser.add_argument("--start", type=int, default=8192, help="the first length that `long` tries")
    parser.add_argument("--lengths", type=int, nargs="+", default=(), help="`long` tries these, and searches for none")
    parser.add_argument("--near", type=float, default=0.02, help="`long` finds the longest row to within this share")
    parser.add_argument("--model", default="", help="folder of the checkpoints; empty: a temporary one")
    parser.add_argument("--method", default="qlora", choices=("qlora", "lora-8bit", "lora"), help="what ours holds its base in")
    parser.add_argument("--gradients", default="auto", choices=("auto", "16bit", "fp8", "int8"), help="what ours multiplies them in")
    parser.add_argument("--older", action="store_true", help="ours plays a card before Ampere: float16, layer by layer")
    parser.add_argument("--sixteen", action="store_true")
    parser.add_argument("--peers", default="")
    parser.add_argument("--profile", action="store_true", help="ours alone: where the time of three steps goes")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(words)
    options.words = words
    if options.table is None and options.out is None:
        parser.error("--out FILE is needed: results are appended to it")
    if options.profile and options.workload == "long":
        parser.error("--profile needs steps, and each try of `long` makes two: profile another workload")
    return options


def main(words: list[str]) -> int:
    """Measure, then print the table."""
    options = options_of(words)
    if options.table:
        print(table(read(options.table)))
        return 0
    if options.peers:
        sys.path.append(options.peers)  # so that what is installed there is found
    split = {name: [part for part in getattr(options, name).split(",") if part] for name in ("only", "settings")}
    flags = {"profile": options.profile, "sixteen": options.sixteen, "tiny": options.cpu}
    ours = {name: getattr(options, name) for name in ("method", "gradients", "older")}
    wanted = cases(options.workload, **split, limit=options.limit, ours=ours, **flags)
    if not wanted:
        raise SystemExit(f"nothing to measure: no backend fits --only {options.only} --settings {options.settings}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), asker(options))
        for case in wanted:
            if case.workload == "long":
                (bench.try_each if options.lengths else bench.search)(case)
            else:
                bench.one(case)
    print(table(read(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
