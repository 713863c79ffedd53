"""A disk that is full, slow to give room or not writable never ends a run; it is told, foretold and kept from filling."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loop_driver import Asked, Ran, drive

from qlora_tui.engine import checkpoint, places, shelf
from qlora_tui.engine.errors import SpaceError
from qlora_tui.engine.events import Evaluated, Finding, Phase, Saved, Stepped
from qlora_tui.engine.spec import RunConfig

Make = Callable[..., RunConfig]
SMALL_FILE = 4096


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the system refuse every write beyond `size` bytes of a file, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limited_between(first: int, last: int, run: RunConfig, folder: Path) -> Ran:
    """Drive a run whose disk is full from after step `first` until after step `last`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step: Stepped) -> None:
        if step.step in (first, last):
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE if step.step == first else soft, hard))

    try:
        return drive(run, folder, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps_saved(ran: Ran) -> list[int]:
    return [event.step for event in ran.of(Saved) if event.kind == "checkpoint"]


def test_a_disk_that_fills_up_is_said_and_training_goes_on(run_of: Make, tmp_path: Path) -> None:
    """The limit is the kernel's, so the errors are those that a full disk gives, half-written files included."""
    run = run_of(max_steps=8, save_steps=2, eval_steps=3)
    ran = limited_between(3, 6, run, tmp_path / "run")
    assert ran.error is None
    assert len(ran.of(Stepped)) == 8
    assert steps_saved(ran) == [2, 6, 8]
    (told,) = [finding for finding in ran.of(Finding) if finding.step == 4]
    assert (told.detector, told.severity) == ("disk", "warn")
    assert "not saved: " in told.message
    assert "the checkpoint of step 4 could not be written: File too large" in told.message
    assert "the last checkpoint is of step 2" in told.message
    assert "make room on this disk" in told.advice[0]
    assert [path.name for path in ran.folder.rglob(".partial*")] == []
    assert shelf.newest_step(ran.folder) == 8


def test_a_hold_out_measured_on_a_full_disk_still_counts(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine import evaluate

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "replace_file", full)
    ran = drive(run_of(max_steps=2, eval_steps=1), tmp_path / "run")
    assert ran.error is None
    assert [(event.step, event.path) for event in ran.of(Evaluated)] == [(0, ""), (1, ""), (2, "")]


def test_a_disk_that_cannot_hold_a_checkpoint_is_found_out_before_step_1(run_of: Make, tmp_path: Path) -> None:
    with files_up_to(SMALL_FILE):
        ran = drive(run_of(), tmp_path / "run")
    assert isinstance(ran.error, SpaceError)
    assert ran.error.exit_code == 2
    assert "a checkpoint could not be written: File too large" in str(ran.error)
    assert not ran.of(Stepped)


def test_room_for_one_checkpoint_alone_is_refused_before_step_1(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "free_bytes", lambda _: shelf.SPARE_BYTES + 100_000)
    ran = drive(run_of(), tmp_path / "run")
    assert isinstance(ran.error, SpaceError)
    assert "to spare, and 64 MiB are free" in str(ran.error)
    assert not ran.of(Stepped)


def test_room_for_fewer_than_are_kept_is_said_with_the_setting_that_fits(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = drive(run_of(max_steps=1), tmp_path / "first").of(Saved)[0].bytes
    monkeypatch.setattr(shelf, "free_bytes", lambda _: shelf.SPARE_BYTES + 6 * size + size // 2)
    ran = drive(run_of(max_steps=2, save_total_limit=5), tmp_path / "run")
    assert ran.error is None
    (told,) = ran.of(Finding)
    assert "the disk has room for 6; this run keeps up to 9, so older ones will go sooner" in told.message
    assert "save_total_limit=2" in told.advice
    assert [phase.note for phase in ran.of(Phase) if "has room for 6" in phase.note]


def test_older_checkpoints_make_room_and_those_that_count_stay(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk for three checkpoints: the fourth save drops the oldest that does not count."""
    folder = tmp_path / "run"
    size = drive(run_of(max_steps=1), tmp_path / "first").of(Saved)[0].bytes
    monkeypatch.setattr(shelf, "free_bytes", lambda _: shelf.SPARE_BYTES + size * 11 // 10 * (4 - len(shelf.steps(folder))))
    ran = drive(run_of(max_steps=8, save_steps=1, eval_steps=100, save_total_limit=6), folder)
    assert ran.error is None
    assert steps_saved(ran) == list(range(1, 9))
    assert [finding for finding in ran.of(Finding) if "not saved" in finding.message] == []
    assert {1, 8} <= set(shelf.steps(folder))  # 1 is to become healthy
    assert len(shelf.steps(folder)) <= 4


def test_a_disk_without_room_is_left_alone(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written at all where it would fill the disk, so that the journal and other programs go on."""
    room = [10**12]
    monkeypatch.setattr(shelf, "free_bytes", lambda _: room[0])

    def fill(step: Stepped) -> None:
        room[0] = shelf.SPARE_BYTES + 1000 if step.step >= 3 else 10**12

    ran = drive(run_of(max_steps=6, save_steps=2, eval_steps=100), tmp_path / "run", on_step=fill)
    assert ran.error is None
    assert steps_saved(ran) == [2]
    told = [finding for finding in ran.of(Finding) if "not saved" in finding.message]
    assert [finding.step for finding in told] == [4, 6]
    assert told[0].numbers["saved_step"] == 2
    assert "checkpoints need" in told[0].message


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")]
)
def test_a_folder_that_becomes_read_only_is_said(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    real = places.tempfile.mkdtemp
    step = [0]

    def refusing(*args: object, **named: object) -> str:
        if step[0] == 2:
            raise OSError(number, words)
        return real(*args, **named)  # type: ignore[no-any-return, call-overload]

    monkeypatch.setattr(places.tempfile, "mkdtemp", refusing)
    ran = drive(run_of(max_steps=4, save_steps=2, eval_steps=100), tmp_path / "run", on_step=lambda event: step.__setitem__(0, event.step))
    assert ran.error is None
    assert steps_saved(ran) == [4]
    assert f"the checkpoint of step 2 could not be written: {words}; there is no checkpoint yet" in ran.of(Finding)[0].message


def test_a_disk_that_gives_back_other_bytes_is_no_checkpoint(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is hashed before it goes to the disk and read back before the folder gets its name."""
    write, lies = checkpoint._write, [True]

    def lying(file: Path, content: bytes, digests: dict[str, str]) -> None:
        write(file, content, digests)
        if file.name == shelf.OPTIMIZER and lies[0]:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(checkpoint, "_write", lying)
    run = run_of(max_steps=4, save_steps=2, eval_steps=100)
    ran = drive(run, tmp_path / "run")
    assert f"{shelf.OPTIMIZER} is damaged: it is not what was saved" in str(ran.error)  # found out before step 1
    assert not ran.of(Stepped)
    lies[0] = False
    ran = drive(run, tmp_path / "run", on_step=lambda step: lies.__setitem__(0, step.step == 2))
    assert ran.error is None
    assert "not saved: " in ran.of(Finding)[0].message
    assert "it is not what was saved; there is no checkpoint yet" in ran.of(Finding)[0].message
    assert shelf.steps(ran.folder) == [4]


def test_a_stop_whose_checkpoint_did_not_fit_says_where_a_resume_goes_on(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [10**12]
    monkeypatch.setattr(shelf, "free_bytes", lambda _: room[0])
    run = run_of(max_steps=9, save_steps=2, eval_steps=100)
    ran = drive(run, tmp_path / "run", Asked({3: "stop"}), on_step=lambda step: room.__setitem__(0, 10**12 if step.step < 3 else 0))
    assert ran.result is not None
    assert ran.result.reason == "stopped and saved at step 3 of 9; without a checkpoint: a resume goes on from step 2"


def test_an_adapter_that_cannot_be_replaced_stays_whole(run_of: Make, tmp_path: Path) -> None:
    folder = drive(run_of(max_steps=2, eval_steps=100), tmp_path / "run").folder
    weights = folder / "adapter" / shelf.ADAPTER_WEIGHTS
    content = weights.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(_: Stepped) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, hard))

    try:
        ran = drive(run_of(max_steps=3, eval_steps=100), folder, resume=True, on_step=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(ran.error, SpaceError)
    assert "the adapter could not be written: File too large" in str(ran.error)
    assert weights.read_bytes() == content
    assert shelf.newest_step(folder) == 2
