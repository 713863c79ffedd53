"""A hostile place to run in: clocks that jump, two owners, planted links, an open umask, code in a model, secrets in the air."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model, write_tokenizer
from loop_driver import drive
from safetensors.torch import load_file
from test_damage import Bomb
from torch import equal

from qlora_tui.engine import checkpoint, journal, preflight, shelf
from qlora_tui.engine.errors import CheckpointError, EngineError, JournalError, ModelError
from qlora_tui.engine.events import Finished, Stepped
from qlora_tui.engine.journal import EVENTS, RunLock, read_records
from qlora_tui.engine.runs import RUN_FILE, new_run_folder, read_info
from qlora_tui.engine.session import Session
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import cli

Make = Callable[..., RunConfig]
PATIENCE = 120


def through(run: RunConfig, folder: Path, *, resume: bool = False) -> Session:
    """Run as the program does, to the end."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    session = Session(run, preflight.check(run), folder=folder, resume=resume)
    session.start()
    assert session.wait(PATIENCE)
    return session


def settings(run: RunConfig) -> list[str]:
    """Return the options that make `run` on the command line."""
    names = ("method", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_steps")
    pairs = [f"{name}={getattr(run, name)}" for name in names]
    return ["--model", run.model_name_or_path, "--data", run.data[0], *(part for pair in pairs for part in ("--set", pair))]


def test_a_clock_that_jumps_changes_nothing(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(max_steps=4, save_steps=2, max_time=3600.0)
    still = through(run, tmp_path / "still")
    real, looks = journal.time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + (10**9 if looks[0] % 3 == 0 else -(10**9) if looks[0] % 3 == 1 else 0)

    monkeypatch.setattr(journal.time, "time", jumping)
    jumped = through(run, tmp_path / "jumped")
    monkeypatch.undo()
    assert (still.exit_code, jumped.exit_code) == (0, 0)
    files = [load_file(session.folder / "adapter" / shelf.ADAPTER_WEIGHTS) for session in (still, jumped)]
    assert all(equal(files[0][name], files[1][name]) for name in files[0])
    records = read_records(jumped.folder / EVENTS)
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert all(0 <= record.event.seconds < PATIENCE for record in records if isinstance(record.event, Stepped))
    assert (read_info(jumped.folder).state, read_info(jumped.folder).step) == ("done", 4)


def test_two_runs_on_one_folder(run_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(max_steps=2)
    folder = through(run, tmp_path / "runs" / "one").folder
    before = (folder / EVENTS).read_bytes()
    lock = RunLock(folder)
    with pytest.raises(JournalError, match=r"run one is already running .*qlora-tui attach one"):
        Session(run, preflight.check(run), folder=folder, resume=True)
    assert cli.main(["--no-ui", "--resume", str(folder), "--max-steps", "4"]) == 2
    assert "run one is running; qlora-tui attach one" in capsys.readouterr().err
    assert (folder / EVENTS).read_bytes() == before
    lock.release()
    assert through(run_of(max_steps=3), folder, resume=True).exit_code == 0


@pytest.mark.parametrize(
    "name", ["checkpoints", "adapter", "eval", "log.txt", "report.md", "report.html", RUN_FILE, EVENTS, "commands.jsonl", "lock"]
)
def test_a_planted_link_is_refused_before_anything_is_written(run_of: Make, tmp_path: Path, name: str) -> None:
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir(mode=0o700)
    target.mkdir()
    (folder / name).symlink_to(target)
    with pytest.raises(JournalError, match=f"{name} is a link or belongs to another user"):
        Session(run_of(), preflight.check(run_of()), folder=folder)
    assert list(target.iterdir()) == []


def test_a_link_planted_while_the_run_goes_on_leads_nowhere(run_of: Make, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()

    def plant(step: Stepped) -> None:
        if step.step == 1:
            (tmp_path / "run" / "checkpoints" / "step-000002").symlink_to(target)
            (tmp_path / "run" / "adapter").symlink_to(target)

    ran = drive(run_of(max_steps=2, save_steps=2), tmp_path / "run", on_step=plant)
    assert ran.error is None
    assert list(target.iterdir()) == []
    assert shelf.newest_step(ran.folder) == 2
    assert not (ran.folder / "adapter").is_symlink()


def test_a_folder_of_checkpoints_that_becomes_a_link_is_refused(run_of: Make, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(target)
    ran = drive(run_of(max_steps=1), tmp_path / "run")
    assert isinstance(ran.error, CheckpointError)
    assert "checkpoints is a link" in str(ran.error)
    assert list(target.iterdir()) == []


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_nobody_else_reads_a_run_whatever_the_umask(run_of: Make, tmp_path: Path) -> None:
    run = run_of(max_steps=2, save_steps=1, runs_dir=str(tmp_path / "runs"))
    with umask(0):
        folder = new_run_folder(run, "open")
        assert through(run, folder).exit_code == 0
        assert through(run_of(max_steps=3, save_steps=1, runs_dir=run.runs_dir), folder, resume=True).exit_code == 0
        journal.leave_wish(folder, "save")
    open_to_others = [path.relative_to(folder) for path in (folder, *folder.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert open_to_others == []


EVIL = "from pathlib import Path\nPath({!r}).write_text('ran')\n"


def evil_model(folder: Path, canary: Path, **config: Any) -> Path:
    """Write a model whose repository brings code of its own in every place where loaders look for it."""
    write_model(folder)
    write_tokenizer(folder)
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, "auto_map": names, **(config if name == "config.json" else {})}))
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py", "setup.py", "conftest.py"):
        (folder / name).write_text(EVIL.format(str(canary)))
    return folder


def test_code_in_a_models_folder_never_runs(run_of: Make, tmp_path: Path) -> None:
    model = evil_model(tmp_path / "model", tmp_path / "canary")
    assert through(run_of(model_name_or_path=str(model), max_steps=1), tmp_path / "run").exit_code == 0
    assert not (tmp_path / "canary").exists()


def test_a_model_that_needs_its_own_code_is_refused_in_one_sentence(run_of: Make, tmp_path: Path) -> None:
    model = evil_model(tmp_path / "model", tmp_path / "canary", model_type="evil", architectures=["EvilForCausalLM"])
    with pytest.raises(ModelError, match="evil") as caught:
        preflight.check(run_of(model_name_or_path=str(model)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(run_of: Make, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    write_model(model)
    write_tokenizer(model)
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(EngineError, match="safetensors") as caught:
        preflight.check(run_of(model_name_or_path=str(model)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.jsonl", "rows.parquet", "rows.csv"])
def test_a_pickle_as_data_is_refused_unopened(run_of: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(EngineError) as caught:
        preflight.check(run_of(data=(str(tmp_path / name),)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "bomb").exists()


def test_a_pickle_as_weights_under_the_right_name_does_not_go_off(run_of: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    write_tokenizer(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    error = drive(run_of(model_name_or_path=str(model)), tmp_path / "run").error
    assert isinstance(error, ModelError)
    assert error.exit_code == 2
    assert not (tmp_path / "bomb").exists()


def test_no_token_reaches_any_output(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two canaries: one that looks like a token, one that only its variable gives away; a good run, a bad one and a resume."""
    canaries = {"HF_TOKEN": "hf_" + "c4nary" * 5, "WANDB_API_KEY": "plain-canary-of-a-key", "OPENAI_API_KEY": "sk-" + "c4nary" * 5}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run = run_of(max_steps=2)
    shown = cli.main(["--no-ui", *settings(run)])
    shown += cli.main(["--no-ui", "--json", "--resume", "last", "--max-steps", "3"])
    for value in canaries.values():
        shown += cli.main(["--no-ui", *settings(run), "--data", f"{value}.jsonl"]) != 2
        shown += cli.main(["--no-ui", *settings(run), "--model", f"./{value}"]) != 2
        shown += cli.main(["--no-ui", *settings(run), "--set", f"lora_target_modules={value}"]) != 2
    assert shown == 0
    out, err = capfd.readouterr()
    texts = {"stdout": out, "stderr": err} | {
        str(path): path.read_bytes().decode("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file()
    }
    assert len(texts) > 20
    assert any("report.md" in name for name in texts)
    leaks = [(name, where) for where, text in texts.items() for name, value in canaries.items() if value in text]
    assert leaks == []


def test_the_last_word_of_a_refused_resume_names_the_checkpoint(run_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = through(run_of(max_steps=2, save_steps=2, eval_steps=100), tmp_path / "runs" / "one").folder
    (shelf.path_of(folder, 2) / shelf.RANDOM).unlink()
    assert cli.main(["--no-ui", "--resume", str(folder), "--max-steps", "4"]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint of this run is sound" in said
    assert "random.safetensors is missing from the checkpoint" in said
    assert [record.attempt for record in read_records(folder / EVENTS) if isinstance(record.event, Finished)] == [1]  # nothing was begun


def test_a_run_toml_edited_by_hand_is_compared_with_the_checkpoint(
    run_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = through(run_of(max_steps=2), tmp_path / "runs" / "one").folder
    text = (folder / RUN_FILE).read_text()
    (folder / RUN_FILE).write_text(text.replace("learning_rate = 0.005", "learning_rate = 0.001"))
    assert cli.main(["--no-ui", "--resume", str(folder), "--max-steps", "4"]) == 2
    assert "learning_rate: it was 0.005 when the run began" in capsys.readouterr().err
    (folder / RUN_FILE).write_text(text.replace("max_steps = 2", "max_steps = 4"))
    assert cli.main(["--no-ui", "--resume", str(folder)]) == 0
    assert "max_steps: 2 -> 4; the run ends there, and the learning rate goes on as in a run of that length" in capsys.readouterr().err


def test_last_healthy_is_what_a_roll_back_may_ask_for(tmp_path: Path) -> None:
    assert checkpoint.last_healthy(tmp_path) is None
