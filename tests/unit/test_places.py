"""Where things live, and that files there are replaced whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from qlora_tui.engine import places
from qlora_tui.engine.places import locked, place, replace_file


def test_one_variable_moves_all_places(home: Path) -> None:
    assert [place(kind) for kind in ("cache", "state", "config")] == [home / "cache", home / "state", home / "config"]


def test_without_it_xdg_variables_and_then_the_home_folder_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QLORA_TUI_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert place("cache") == tmp_path / "c" / "qlora-tui"
    assert place("state") == tmp_path / ".local/state/qlora-tui"


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    replace_file(path, "one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "home"] == ["file"]


def _add_lines(path: str, count: int) -> None:
    for _ in range(count):
        with locked(Path(path)):
            before = int(Path(path).read_text())
            replace_file(Path(path), str(before + 1))


def test_two_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_lines, args=(str(path), 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert path.read_text() == "20"


def fill(target: Path, text: str) -> None:
    with places.published(target) as folder:
        (folder / "part").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "part").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_its_name_whole_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(places, "exchanged", lambda one, other: False)
    before = os.umask(0)
    try:
        fill(tmp_path / "it", "one")
        fill(tmp_path / "it", "two")
    finally:
        os.umask(before)
    assert (tmp_path / "it" / "part").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["it"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "it").rglob("part")} == {0o600}
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == stat.S_IMODE((tmp_path / "it" / "inner").stat().st_mode) == 0o700


def test_here_names_can_be_exchanged(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").write_text("file")
    assert places.exchanged(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").read_text() == "file"
    assert not places.exchanged(tmp_path / "one", tmp_path / "nothing")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_cannot_be_filled_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(places, "exchanged", lambda one, other: False)
    fill(tmp_path / "it", "one")

    def full(_folder: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(places, "_sync_all", full)
    with pytest.raises(OSError, match="full"):
        fill(tmp_path / "it", "half")
    assert (tmp_path / "it" / "part").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["it"]


def test_what_a_kill_left_is_settled(tmp_path: Path) -> None:
    fill(tmp_path / ".partial-abc", "half")
    fill(tmp_path / ".aside-lost", "old")
    fill(tmp_path / "kept", "new")
    fill(tmp_path / ".aside-kept", "old")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("stays")
    (tmp_path / ".partial-link").symlink_to(tmp_path / "outside")
    places.settle(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != "home")
    assert names == ["kept", "lost", "outside"]
    assert (tmp_path / "kept" / "part").read_text() == "new"
    assert (tmp_path / "lost" / "part").read_text() == "old"
    assert (tmp_path / "outside" / "file").read_text() == "stays"
