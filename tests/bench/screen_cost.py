"""Training throughput with the screen on against `--no-ui`: whole runs of the product, in pairs, alternating.

usage: python tests/bench/screen_cost.py [--pairs N] [--steps N]                    the demo, on this machine's processors
       python tests/bench/screen_cost.py --gpu [--shape NAME] [--pairs N] [--steps N]   random weights of a public shape on a GPU
       python tests/bench/screen_cost.py --tiny                                     a two-layer model: proves the script alone

Both runs of a pair get the same options and seed; which goes first alternates, so that a machine that grows warm or busy
bends both alike; a short run before them is not counted. The screen is drawn on a pseudo-terminal of 120 x 36 whose bytes
are read as they come. Throughput is tokens between the first counted step and the last over the time between them, as the
journal has it, so that all a screen could cost counts: the interpreter's lock, the processor, the disk. Prints one line a
run, the ratio of each pair, their median and range, and what the screen drew a second.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from pty_screen import Terminal  # noqa: E402  found through the line above

from qlora_tui.engine.events import Finished, Planned, Stepped  # noqa: E402
from qlora_tui.engine.journal import EVENTS, read_records  # noqa: E402

WARM = 3  # steps that are not counted
PATIENCE = 1800.0
PRODUCT = "import sys\nfrom qlora_tui.tui.cli import main\nsys.exit(main(sys.argv[1:]))\n"
SIZE = (120, 36)
FAST = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 512, "gradient_checkpointing": "false"}


def throughput(runs: Path) -> float:
    """Return the tokens a second of the one run in `runs`.

    Raises:
        SystemExit: it did not end well, or took too few steps.
    """
    (journal,) = runs.glob(f"*/{EVENTS}")
    records = read_records(journal)
    word = records[-1].event
    if not isinstance(word, Finished) or word.outcome != "done":
        raise SystemExit(f"the run did not end well: {word}")
    steps = [(record.t, record.event.tokens) for record in records if isinstance(record.event, Stepped)]
    if len(steps) < WARM + 3:
        raise SystemExit(f"{len(steps)} steps are too few")
    counted = steps[WARM - 1 :]
    seconds = sorted(record.event.seconds for record in records if isinstance(record.event, Stepped))
    waited = sum(record.event.data_seconds for record in records if isinstance(record.event, Stepped))
    chosen = [dict(record.event.choices) for record in records if isinstance(record.event, Planned)][-1]
    print(
        f"  {journal.parent.parent.name}: step {seconds[len(seconds) // 10]:.4f} / {statistics.median(seconds):.4f} / "
        f"{seconds[len(seconds) * 9 // 10]:.4f} s (tenth, median, ninth tenth), data {waited:.2f} s in all, chosen {chosen}",
        flush=True,
    )
    return sum(tokens for _, tokens in counted[1:]) / (counted[-1][0] - counted[0][0])


def without(options: list[str], runs: Path) -> float:
    """Run with `--no-ui`."""
    command = [sys.executable, "-c", PRODUCT, *options, "--no-ui", "--runs-dir", str(runs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    return throughput(runs)


def drawn(options: list[str], runs: Path) -> tuple[float, float]:
    """Run with the screen; return tokens a second, and KiB a second that were drawn while it trained."""
    home = os.environ.get("QLORA_TUI_HOME")
    terminal = Terminal(PRODUCT, *options, "--runs-dir", str(runs), size=SIZE, **({"QLORA_TUI_HOME": home} if home else {}))
    deadline = time.monotonic() + PATIENCE
    try:
        while not list(runs.glob(f"*/{EVENTS}")):
            terminal.type(b"\r")
            _read(terminal, 0.5, deadline)
        began, before = time.monotonic(), len(terminal.seen)
        while not _ended(runs):
            _read(terminal, 0.5, deadline)
        rate = (len(terminal.seen) - before) / (time.monotonic() - began) / 1024
        while terminal.process.poll() is None:
            terminal.type(b"q")
            _read(terminal, 0.5, deadline)
    finally:
        terminal.close()
    return throughput(runs), rate


def _read(terminal: Terminal, seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise SystemExit(f"it took too long; the screen's last bytes: {terminal.seen[-2000:]!r}")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([terminal.master], [], [], left)[0]:
            terminal.seen += os.read(terminal.master, 65536)


def _ended(runs: Path) -> bool:
    return any(path.read_bytes().rstrip().rsplit(b"\n", 1)[-1].find(b'"type":"finished"') > 0 for path in runs.glob(f"*/{EVENTS}"))


def options_of(asked: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a run, after making what it trains and what on."""
    if not (asked.gpu or asked.tiny):
        return ["demo", "--max-steps", str(asked.steps or 12)]
    settings: dict[str, object] = {**FAST, "eval_steps": 100_000, "save_steps": 100_000, "val_set_size": 8}
    model, data = folder / "model", folder / "rows.jsonl"
    import measure

    if asked.tiny:
        from conftest import write_model, write_tokenizer

        write_model(model)
        write_tokenizer(model)
        settings |= {"method": "lora", "max_length": 256}
        measure.rows(data, 120, 256)
    else:
        # in a process of its own: its weights and its context must not stay on the card
        subprocess.run([sys.executable, measure.__file__, "make", str(model), asked.shape], check=True, timeout=PATIENCE)
        measure.rows(data, 2000, 512)
    steps = asked.steps or (60 if asked.tiny else 200)
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--model", str(model), "--data", str(data), "--max-steps", str(steps), *flags]


def pair(options: list[str], folder: Path, number: int) -> tuple[float, float, float]:
    """Run both ways, the second first in every other pair."""
    plain = without(options, folder / "plain") if number % 2 else 0.0
    shown, rate = drawn(options, folder / "screen")
    plain = plain or without(options, folder / "plain")
    return plain, shown, rate


def main() -> None:
    """Run the pairs and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", default="Qwen/Qwen3-1.7B")
    asked = parser.parse_args()
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as place:
        options = options_of(asked, Path(place))
        # what this machine learns from a first run may change a later one's choices: neither side of a pair may be that first run
        without([*options, "--max-steps", "12"], Path(place) / "first")
        for number in range(asked.pairs):
            plain, shown, rate = pair(options, Path(place) / str(number), number)
            ratios.append(shown / plain)
            rates.append(rate)
            print(
                f"pair {number + 1}: --no-ui {plain:,.1f} tok/s, screen {shown:,.1f} tok/s, ratio {ratios[-1]:.4f}, {rate:.1f} KiB/s drawn",
                flush=True,
            )
    middle = f"median {statistics.median(ratios):.4f}, mean {statistics.fmean(ratios):.4f}"
    print(f"{middle}, from {min(ratios):.4f} to {max(ratios):.4f}, {len(ratios)} pairs")
    print(f"drawn: {statistics.median(rates):.1f} KiB/s at {SIZE[0]} x {SIZE[1]}")


if __name__ == "__main__":
    main()
