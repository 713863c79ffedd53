"""Runs written by the real journal, a desk without a network, and waiting that polls instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from canned_run import QuietDesk, middle, opening

from qlora_tui.engine import events as ev
from qlora_tui.engine.journal import Journal, RunLock
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.screens.desk import Desk

Until = Callable[[Any, Callable[[], bool]], Awaitable[None]]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every screen drawn as on a terminal with all colours, wherever the tests run."""
    for name in ("NO_COLOR", "COLORFGBG", "SSH_CONNECTION", "TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture
def run_config() -> RunConfig:
    return RunConfig(model_name_or_path="Qwen/Qwen3-8B", data=("chats.jsonl",))


@pytest.fixture
def write_run(tmp_path: Path, run_config: RunConfig) -> Iterator[Callable[..., tuple[Path, Journal, RunLock]]]:
    """Return a function that writes a run folder with the real journal and keeps its lock."""
    kept: list[tuple[Journal, RunLock]] = []

    def write(events: Sequence[ev.Event] | None = None, name: str = "20261125-164012-test") -> tuple[Path, Journal, RunLock]:
        folder = tmp_path / name
        folder.mkdir()
        lock, journal = RunLock(folder), Journal(folder)
        for event in events if events is not None else [*opening(run_config), *middle()]:
            journal.write(event)
        kept.append((journal, lock))
        return folder, journal, lock

    yield write
    for journal, lock in kept:
        journal.close()
        lock.release()


@pytest.fixture
def until() -> Until:
    """Return a wait that lets the app work until something holds, and fails after a while."""

    async def wait(pilot: Any, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline, "it did not happen"
            await pilot.pause(0.02)

    return wait


@pytest.fixture
def desk() -> Desk:
    return QuietDesk()
