"""A server that forks runs of the tiny model and kills them where it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_server import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all kills; its caches are its own."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".pkg"),
        "QLORA_TUI_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    log = (home / "stderr.txt").open("w")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=home
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (home / "stderr.txt").read_text()
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()
    log.close()


@pytest.fixture
def record(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Show a figure in the terminal and keep it in the report."""

    def say(text: str) -> None:
        record_property("figure", text)
        with capsys.disabled():
            print(f"\n{text}")

    return say
