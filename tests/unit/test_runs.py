"""The list of runs says what the folders say, and a new folder is ours alone."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import RUN, step

from qlora_tui.engine.errors import ConfigError, JournalError, SpaceError
from qlora_tui.engine.events import Device, Event, Finished, Started
from qlora_tui.engine.journal import EVENTS, Journal, RunLock
from qlora_tui.engine.runs import claim, find_run, list_runs, new_run_folder, read_info, slug


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path


def make(runs: Path, name: str, *events: Event) -> Path:
    folder = runs / name
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").touch()
    journal = Journal(folder)
    for event in (Started(name, {}, {}, {}), *events):
        journal.write(event)
    journal.close()
    return folder


def test_a_run_is_known_by_what_its_folder_says(runs: Path) -> None:
    done = make(runs, "a", step(1), step(3), Finished("done", 0, "all steps done"))
    crashed = make(runs, "b", step(2))
    running = make(runs, "c", step(1))
    lock = RunLock(running)
    try:
        assert (read_info(done).state, read_info(done).step, read_info(done).total_steps) == ("done", 3, 3)
        assert (read_info(crashed).state, read_info(crashed).outcome) == ("crashed", "")
        assert read_info(running).state == "running"
    finally:
        lock.release()
    assert read_info(done).loss == pytest.approx(3.97)


def test_a_later_attempt_hides_the_last_word_of_an_earlier_one(runs: Path) -> None:
    folder = make(runs, "a", step(1), Finished("stopped", 130, "asked"))
    make(runs, "a", step(2))
    assert (read_info(folder).state, read_info(folder).step) == ("crashed", 2)


def test_the_last_step_is_found_behind_a_long_tail_of_other_events(runs: Path) -> None:
    folder = make(runs, "a", step(2), *(Device(memory_ours_bytes=number) for number in range(3000)))
    assert (folder / EVENTS).stat().st_size > 3 * 2**16
    assert read_info(folder).step == 2


def test_a_torn_line_and_foreign_folders_do_no_harm(runs: Path) -> None:
    folder = make(runs, "a", step(1))
    with (folder / EVENTS).open("ab") as file:
        file.write(b'{"v":1,"att')
    (runs / "notes").mkdir()
    (runs / "file.txt").touch()
    assert [info.id for info in list_runs(runs)] == ["a"]
    assert read_info(folder).step == 1


def test_the_newest_run_comes_first(runs: Path) -> None:
    for name, moment in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        (runs / name).mkdir()
        line = {"v": 1, "attempt": 1, "seq": 1, "t": moment, "type": "started", "run_id": name, "config": {}, "versions": {}, "device": {}}
        (runs / name / EVENTS).write_text(json.dumps(line) + "\n")
    assert [info.id for info in list_runs(runs)] == ["b", "c", "a"]


def test_no_runs_folder_is_no_error(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_id_path_and_last(runs: Path) -> None:
    first = make(runs, "20261125-1-a")
    second = make(runs, "20261125-2-b")
    assert find_run("20261125-1-a", runs) == first
    assert find_run(str(first), runs) == first
    assert find_run("last", runs) == second
    lock = RunLock(first)
    assert find_run("last", runs) == first  # one that runs comes first
    lock.release()


def test_a_name_that_is_nearly_right_is_named(runs: Path) -> None:
    make(runs, "20261125-164012-chat")
    with pytest.raises(ConfigError, match="did you mean 20261125-164012-chat"):
        find_run("20261125-164012-chta", runs)
    with pytest.raises(ConfigError, match="no run yet"):
        find_run("last", runs.parent / "other")


def test_a_run_begun_elsewhere_is_remembered(tmp_path: Path) -> None:
    folder = new_run_folder(replace(RUN, runs_dir=str(tmp_path / "far" / "runs")), "demo")
    make(folder.parent, folder.name, step(1))
    here = tmp_path / "here"
    assert list_runs(here) == []
    assert [info.path for info in list_runs(here, everywhere=True)] == [folder]
    assert find_run(folder.name, here) == folder
    assert find_run("last", here) == folder


def test_a_new_folder_is_private_whatever_the_umask(runs: Path) -> None:
    before = os.umask(0)
    try:
        folder = new_run_folder(replace(RUN, runs_dir=str(runs)), "Qwen/Qwen3-8B")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.name.endswith("-qwen3-8b")


def test_runs_begun_within_one_second_get_folders_of_their_own(runs: Path) -> None:
    run = replace(RUN, runs_dir=str(runs))
    assert len({new_run_folder(run, "demo") for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc", "etc"),
        ("a\x00b\x1b[2J", "a-b-2j"),
        ("..", "run"),
        ("", "run"),
        ("x" * 300, "x" * 40),
        ("\u202eevil", "evil"),
        ("/", "run"),
    ],
)
def test_a_name_never_leaves_the_runs_folder(runs: Path, name: str, expected: str) -> None:
    assert slug(name) == expected
    assert new_run_folder(replace(RUN, runs_dir=str(runs)), name).parent == runs


def test_a_runs_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpaceError, match="--runs-dir"):
        new_run_folder(replace(RUN, runs_dir=str(tmp_path / "file")), "demo")


def test_an_old_run_is_claimed_only_if_nothing_in_it_is_a_link(runs: Path, tmp_path: Path) -> None:
    folder = make(runs, "a")
    assert claim(folder) == folder
    (folder / EVENTS).unlink()
    (folder / EVENTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="link"):
        claim(folder)
