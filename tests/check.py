"""Everything that must be green, in order: lint, form, types, import contracts, tests (the wheel is one of them).

The same script runs on your machine and in CI. Arguments go to pytest: `python tests/check.py -k budget`.
Tests run in as many processes as there are processors, four at most: each may hold a gigabyte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {
    "lint": ["ruff", "check", "."],
    "form": ["ruff", "format", "--check", "."],
    "types": ["mypy", "-p", "qlora_tui.engine", "-p", "qlora_tui.tui"],
    "imports": ["lint-imports"],
}


def main(arguments: list[str]) -> int:
    """Run every check even after one failed, so that one run shows everything; pytest's summary comes last."""
    os.chdir(ROOT)
    failed = [name for name, command in CHECKS.items() if not quiet(name, command)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the processors; threads of each would fight over them
    side_by_side = ["-n", str(min(4, os.cpu_count() or 1))]
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", *side_by_side, *arguments], check=False).returncode
    if failed:
        print(f"not green: {', '.join(failed)} (see above)")
    return code or bool(failed)


def quiet(name: str, command: list[str]) -> bool:
    """Run one tool of this environment; a line when it is content, all it says when it is not."""
    tool = Path(sys.executable).with_name(command[0])
    start = time.monotonic()
    ended = subprocess.run([str(tool), *command[1:]], capture_output=True, text=True, check=False)
    good = ended.returncode == 0
    print(f"{'ok  ' if good else 'FAIL'} {name:8} {' '.join(command)}  ({time.monotonic() - start:.1f} s)", flush=True)
    if not good:
        print(ended.stdout + ended.stderr, flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
