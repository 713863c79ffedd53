"""The journal holds whole lines whatever happens, and one process owns a run."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_tui.engine import journal
from qlora_tui.engine.errors import JournalError
from qlora_tui.engine.events import Command, Finished, Resumed, Stepped
from qlora_tui.engine.journal import (
    COMMANDS,
    EVENTS,
    LOCK,
    Inbox,
    Journal,
    RunLock,
    Tail,
    is_running,
    last_record,
    leave_wish,
    read_records,
)

STEP = Stepped(1, 2, 0.5, 3.0, 1.0, False, False, 1e-4, 10, 5, 0.1, 0.0)
DONE = Finished("done", 0, "all steps done")


def test_lines_are_numbered_across_attempts_and_the_file_is_private(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.write(STEP)
    first.write(DONE)
    first.close()
    second = Journal(tmp_path)
    second.write(Resumed(1))
    second.close()
    assert [(record.attempt, record.seq) for record in read_records(tmp_path / EVENTS)] == [(1, 1), (1, 2), (2, 3)]
    assert stat.S_IMODE((tmp_path / EVENTS).stat().st_mode) == 0o600


def test_nothing_follows_the_last_word(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(DONE)
    assert journal.write(DONE) is None
    assert journal.write(STEP) is None
    journal.close()
    assert len(read_records(tmp_path / EVENTS)) == 1


def test_a_torn_line_is_cut_off_before_the_next_attempt(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(STEP)
    journal.close()
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"v":1,"attempt":1,"se')
    again = Journal(tmp_path)
    again.write(DONE)
    again.close()
    assert [type(record.event) for record in read_records(tmp_path / EVENTS)] == [Stepped, Finished]
    assert (tmp_path / EVENTS).read_bytes().count(b"\n") == 2


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    threads = [threading.Thread(target=lambda: [journal.write(STEP) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert [record.seq for record in read_records(tmp_path / EVENTS)] == list(range(1, 401))


def test_a_reader_gets_whole_lines_only(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "file")
    assert tail.lines() == []
    (tmp_path / "file").write_bytes(b"one\ntw")
    assert tail.lines() == ["one"]
    with (tmp_path / "file").open("ab") as file:
        file.write(b"o\nthree\n")
    assert tail.lines() == ["two", "three"]


def test_a_reader_takes_a_long_file_in_parts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456\n" * 10)
    tail = Tail(tmp_path / "file")
    assert len(tail.lines(limit=20)) == 2
    assert len(tail.lines()) == 8


def test_a_torn_line_is_read_again_once_it_is_whole_or_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntorn and lo")
    tail = Tail(path)
    assert tail.lines() == ["one"]
    path.write_bytes(b"one\ntwo\n")
    assert tail.lines() == ["two"]


def test_a_line_longer_than_a_part_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100 + b"\nshort\n")
    tail = Tail(tmp_path / "file")
    assert tail.lines(limit=10) == ["x" * 100]
    assert tail.lines(limit=10) == ["short"]


@pytest.mark.parametrize(
    ("length", "seen"), [(1000, ["one", "two", "three"]), (10, ["two", "three"]), (9, ["three"]), (6, ["three"]), (5, [])]
)
def test_a_reader_may_begin_near_the_end(tmp_path: Path, length: int, seen: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"one\ntwo\nthree\n")
    assert Tail.near_end(tmp_path / "file", length).lines() == seen
    assert Tail.near_end(tmp_path / "none", length).lines() == []


@pytest.mark.parametrize("rubbish", [0, 1, 70_000, 700_000])
def test_the_newest_record_is_found_from_the_end_and_what_is_torn_is_cut_off(tmp_path: Path, rubbish: int) -> None:
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.write(STEP)
    journal.close()
    path = tmp_path / EVENTS
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * rubbish)
    assert last_record(path) == read_records(path)[-1]
    again = Journal(tmp_path)
    assert (again.attempt, path.read_bytes()) == (2, whole)
    assert again.write(STEP).seq == 4
    again.close()
    path.write_bytes(whole + b"nonsense\n" * rubbish)
    assert last_record(path).seq == 3


def test_a_journal_without_a_whole_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_bytes(b'{"v":1')
    assert last_record(tmp_path / EVENTS) is None
    assert last_record(tmp_path / "none") is None
    journal = Journal(tmp_path)
    assert (journal.attempt, (tmp_path / EVENTS).read_bytes()) == (1, b"")
    journal.close()


def test_an_old_wish_is_never_read_again(tmp_path: Path) -> None:
    leave_wish(tmp_path, "stop")
    inbox = Inbox(tmp_path)
    assert inbox.take() == []
    wish = leave_wish(tmp_path, "save", {"why": "now"}, attempt=2)
    (found,) = inbox.take()
    assert (found.id, found.name, found.args, found.attempt) == (wish, "save", {"why": "now"}, 2)
    assert inbox.take() == []


def test_lines_that_are_no_wish_are_passed_over(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    rubbish = ["nonsense", '{"id":1}', "[]", "[" * 100_000, '{"id":"a","t":[],"name":"stop"}']
    rubbish.append('{"id":"a","t":1,"name":"stop","attempt":1e999}')
    (tmp_path / COMMANDS).write_text("\n".join([*rubbish, '{"v":1,"id":"a","t":1,"name":"stop"}\n']))
    assert [wish.name for wish in inbox.take()] == ["stop"]


def test_the_lock_names_its_owner(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert is_running(tmp_path)
    with pytest.raises(JournalError, match="already running"):
        RunLock(tmp_path)
    lock.release()
    assert not is_running(tmp_path)
    RunLock(tmp_path).release()


def test_a_look_from_elsewhere_does_not_refuse_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()
    looking = (tmp_path / LOCK).open()
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    monkeypatch.setattr(journal.time, "sleep", lambda seconds: looking.close())
    RunLock(tmp_path).release()
    assert looking.closed


def test_looking_at_a_run_never_takes_it(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_the_kernel_drops_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qlora_tui.engine.journal import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_running(tmp_path)
        process.kill()
        process.wait(30)
    assert not is_running(tmp_path)


def test_an_answer_is_an_event_like_any_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record = journal.write(Command("a", "stop", True, "asked"))
    journal.close()
    assert record is not None
    assert read_records(tmp_path / EVENTS) == [record]


def full_after(monkeypatch: pytest.MonkeyPatch, taken: int, number: int = errno.ENOSPC) -> list[int]:
    """Let the disk take `taken` more bytes and then refuse; emptying the list makes room."""
    room, real = [taken], os.write

    def write(handle: int, data: bytes) -> int:
        if not room:
            return real(handle, data)
        if room[0] == 0:
            raise OSError(number, "no room")
        done = real(handle, bytes(data[: room[0]]))
        room[0] -= done
        return done

    monkeypatch.setattr(journal.os, "write", write)
    return room


@pytest.mark.parametrize("taken", [0, 1, 40])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_on_a_full_disk_lines_wait_and_none_is_lost_or_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int, number: int
) -> None:
    writer = Journal(tmp_path)
    writer.write(STEP)
    room = full_after(monkeypatch, taken, number)
    writer.write(Resumed(1))
    writer.write(Resumed(2))
    assert [record.seq for record in read_records(tmp_path / EVENTS)] == [1]
    room.clear()
    writer.write(DONE)
    writer.close()
    assert [record.seq for record in read_records(tmp_path / EVENTS)] == [1, 2, 3, 4]
    assert (tmp_path / EVENTS).read_bytes().count(b"\n") == 4


def test_a_disk_that_fails_is_not_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path)
    full_after(monkeypatch, 0, errno.EIO)
    with pytest.raises(OSError, match="no room"):
        writer.write(STEP)


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path)
    full_after(monkeypatch, 0)
    monkeypatch.setattr(journal, "_HELD_BYTES", 500)
    writer.write(STEP)
    writer.write(Resumed(1))
    with pytest.raises(OSError, match="no room"):
        writer.write(STEP)


def test_a_closed_journal_writes_into_no_other_file(tmp_path: Path) -> None:
    writer = Journal(tmp_path)
    writer.close()
    writer.close()
    with (tmp_path / "other").open("wb") as other:  # gets the number that the journal's file had
        assert writer.write(STEP) is None
        other.flush()
    assert (tmp_path / "other").read_bytes() == b""
