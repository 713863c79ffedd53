"""Making an export: nothing half-written, nothing replaced, nothing begun that cannot end, and a run that survives it all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from export_runs import bench_of, opened, target_of
from loop_driver import Asked, drive

from qlora_tui.engine import models, preflight, report
from qlora_tui.engine.errors import CheckpointError, ConfigError, JournalError, ModelError, SpaceError, Stopped, WontFit
from qlora_tui.engine.events import Evaluated, Finding, Saved
from qlora_tui.engine.export import kind_of, llama, merged, planned, records, room
from qlora_tui.engine.export.make import Bench, make
from qlora_tui.engine.export.source import open_run, trained_losses
from qlora_tui.engine.export.target import Source, Target, Work
from qlora_tui.engine.hub import ModelFiles
from qlora_tui.engine.journal import Journal, RunLock
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.tui.cli import main


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Nothing half-written


def ends_at(number: int) -> Callable[[], None]:
    looks = iter(range(number))

    def look() -> None:
        if next(looks, None) is None:
            raise Stopped("asked to stop")

    return look


@pytest.mark.parametrize("name", ["adapter", "merged", "ollama"])
def test_a_wish_to_stop_at_any_moment_leaves_nothing(source: Source, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "available", lambda: "not here")
    kind = "f16" if name == "ollama" else ""
    to, looks = tmp_path / "to", 0

    def count() -> None:
        nonlocal looks
        looks += 1

    bench_of(source).rows()  # what is tokenized is kept: the rows that count are those of every later time
    make(bench_of(source, look=count), target_of(name), to / "whole", kind)
    shutil.rmtree(to / "whole")
    (source.folder / records.LIST).unlink()
    for number in {0, 1, looks // 3, looks // 2, looks - 2}:
        with pytest.raises(Stopped):
            make(bench_of(source, look=ends_at(number)), target_of(name), to / "out", kind)
        assert inside(to) == []
    assert records.read_list(source.folder) == []


def test_a_full_disk_leaves_nothing(source: Source, tmp_path: Path) -> None:
    def write(work: Work) -> None:
        merged.write(work)
        raise OSError(28, os.strerror(28))

    with pytest.raises(SpaceError, match="could not be written: No space left"):
        make(bench_of(source), dataclasses.replace(target_of("merged"), write=write), tmp_path / "to" / "out", "")
    assert inside(tmp_path / "to") == []


def test_what_a_kill_left_is_swept_a_day_later(source: Source, tmp_path: Path) -> None:
    old, young = tmp_path / ".out.export-1", tmp_path / ".out.export-2"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    make(bench_of(source), target_of("adapter"), tmp_path / "out", "", checked=False)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_folder_that_holds_something_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(bench_of(source), target_of("adapter"), tmp_path / "out", "", checked=False)  # an empty one will do
    held = inside(tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "out" / "export.json"):
        with pytest.raises(ConfigError, match="no empty folder, and an export replaces nothing"):
            make(bench_of(source), target_of("merged"), place, "", checked=False)
    assert inside(tmp_path / "out") == held


def test_an_export_that_was_refused_gives_way_to_the_next_one_refused(source: Source, tmp_path: Path) -> None:
    def write(work: Work) -> None:
        merged.write(work)
        shutil.copyfile(source.base / "model.safetensors", work.folder / "model.safetensors")

    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed" / "mine").touch()
    paths = {make(bench_of(source), dataclasses.replace(target_of("merged"), write=write), tmp_path / "out", "")["path"] for _ in range(2)}
    assert paths == {str(tmp_path / "out.failed-2")}
    assert inside(tmp_path / "out.failed") == ["mine"]


# Before anything is written


def test_a_disk_without_room_and_memory_without_room_are_told(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = dataclasses.replace(source, spec=dataclasses.replace(source.spec, num_hidden_layers=10_000_000))
    with pytest.raises(WontFit, match=r"to prove an export takes about .* of RAM.*; export it on a larger machine, or with --unchecked"):
        make(bench_of(huge), target_of("merged"), tmp_path / "out", "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(SpaceError, match=r"takes about 6. MiB of disk and 1 KiB are free"):
        make(bench_of(source), target_of("merged"), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_while_comparing_is_told(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("qlora_tui.engine.export.engines.load", load)
    with pytest.raises(WontFit, match="memory ran out while the export was compared with the adapter; close other programs"):
        make(bench_of(source), target_of("merged"), tmp_path / "to" / "out", "")
    assert inside(tmp_path / "to") == []


def test_the_type_of_computation_follows_the_room() -> None:
    spec = models.find("builtin:smollm2-135m")
    assert spec is not None
    kinds = [found.type_name if (found := room._in_ram(spec, gib << 30)) else "" for gib in (1, 2, 4)]
    assert kinds == ["", "bfloat16" if room._needed(spec, 4) > 2 << 30 else "float32", "float32"]
    assert room._in_ram(spec, room._needed(spec, 4) - 1) == room.Room("cpu", "bfloat16")


def test_a_run_that_runs_or_has_no_adapter_or_no_base_is_told(source: Source, tiny_model: Path, tmp_path: Path) -> None:
    def read() -> Source:
        return open_run(source.folder, lambda: None, lambda done, total: None)

    assert read() == source
    lock = RunLock(source.folder)
    with pytest.raises(JournalError, match="run one is running; export it once it has ended"):
        read()
    lock.release()
    (source.folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="run one has no adapter; qlora-tui --resume one finishes it"):
        read()


def test_a_base_that_is_gone_is_told(ran: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    folder = ran(model)
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="the folder of the run's base is gone; put it back"):
        opened(folder)


def test_another_base_in_its_place_is_told(ran: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    from conftest import write_model

    model = shutil.copytree(tiny_model, tmp_path / "model")
    folder = ran(model)
    write_model(model, initializer_range=0.03)
    with pytest.raises(CheckpointError, match="not those that the run was trained on"):
        opened(folder)


def test_the_losses_as_trained_are_those_of_the_adapter_that_was_saved(source: Source) -> None:
    rows = [{"row": row, "nll": 2.0 * row, "tokens": 4} for row in (3, 5)]
    (source.folder / "eval" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = Journal(source.folder)
    journal.write(Saved(3, "adapter", 1, "adapter"))
    journal.write(Evaluated(3, 1.0, 2, 0.1, "eval/mine.jsonl"))
    assert trained_losses(source.folder) == {3: 1.5, 5: 2.5}
    journal.write(Saved(4, "adapter", 1, "adapter"))  # trained on, stopped: that one was not measured
    journal.close()
    assert trained_losses(source.folder) == {}


# Planned with a run


def small_files(model: Path) -> ModelFiles:
    return ModelFiles(model, complete=True)


def told(run: RunConfig, model: Path) -> list[str]:
    return [str(problem) for problem in preflight.model_problems(run, small_files(model), models.from_folder(model))]


def test_planned_exports_are_checked_before_the_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = from_values(
        {"model_name_or_path": str(tiny_model), "max_length": 256, "method": "qlora", "export_to": ("adapter", "merged", "gguf", "ollama")}
    )
    assert told(run, tiny_model) == []
    assert told(dataclasses.replace(run, export_to=("mergd",)), tiny_model) == ["export_to: no target 'mergd'; did you mean merged?"]
    assert told(dataclasses.replace(run, export_to=("merged",), export_type="q8_0"), tiny_model) == [
        "export_type: no export is planned that has a type; plan gguf or ollama in export_to, or leave it out"
    ]
    assert told(dataclasses.replace(run, export_type="q7"), tiny_model)[0].startswith("export_type: no type 'q7' of gguf")
    smaller = told(dataclasses.replace(run, export_type="q4_k_m"), tiny_model)
    assert smaller == ["export_to: q4_k_m is made by llama-quantize, which is not on the PATH; it comes with llama.cpp; or say q8_0"]
    monkeypatch.setattr(room.machine, "ram_bytes", lambda: (1 << 20, 1 << 20))
    assert "to prove an export takes about" in told(run, tiny_model)[0]


def test_a_family_that_is_no_gguf_a_template_that_is_no_go_and_a_base_of_four_bits_are_told(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    run = from_values({"model_name_or_path": str(model), "max_length": 256, "method": "qlora", "export_to": ("merged", "ollama")})
    write_tokenizer(model, "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}")
    assert "export_to: its chat template does more than Ollama's language" in told(run, model)[0]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    (sentence,) = told(run, model)
    assert "olmo2" in sentence
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": four}))
    assert told(run, model) == [
        "export_to: the checkpoint holds its weights in 4 bits (nf4), so there are no 16-bit weights to merge into; "
        "export the adapter, or train on the 16-bit original: it is quantized while loading"
    ]


def test_the_disk_must_hold_planned_exports(tiny_model: Path) -> None:
    run, spec = from_values({"export_to": ("merged", "gguf")}), models.from_folder(tiny_model)
    weights = merged.weights_bytes(tiny_model, spec)
    assert weights == (tiny_model / "model.safetensors").stat().st_size
    assert 2 * weights < planned.disk(run, spec, tiny_model) - 2 * 64 * 2**20 < 3 * weights
    assert planned.disk(RunConfig(), spec, tiny_model) == 0


def test_planned_exports_are_made_at_the_end_and_told(ran: Callable[..., Path], tmp_path: Path) -> None:
    folder = ran(export_to=("merged", "adapter"))
    assert inside(folder / "export") == ["adapter", "merged"]
    assert [record["target"] for record in records.read_list(folder)] == ["adapter", "merged"]
    assert all(record["parity"]["passed"] for record in records.read_list(folder))


def test_what_comes_after_an_export_that_fails_is_told_as_well(
    tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = planned.make

    def broken(bench: Bench, target: Target, *rest: Any, **more: Any) -> dict[str, Any]:
        if target.name == "merged":
            raise ZeroDivisionError
        return honest(bench, target, *rest, **more)

    monkeypatch.setattr(planned, "make", broken)
    run = run_of(tiny_model, write_jsonl(chat_rows), export_to=("ollama", "merged", "adapter"))
    monkeypatch.setattr(planned, "problems", lambda *_: [])
    finding = [event for event in drive(run, tmp_path / "broken").of(Finding) if event.detector == "export"][-1]
    assert finding.advice == ("qlora-tui export broken --to merged", "qlora-tui export broken --to ollama")


def run_of(tiny_model: Path, data: Path, **values: Any) -> RunConfig:
    usual: dict[str, Any] = {"method": "lora", "max_length": 256, "max_steps": 2, "gradient_checkpointing": "false"}
    return from_values({"model_name_or_path": str(tiny_model), "data": (str(data),), **usual, **values})


def test_an_export_that_fails_or_is_stopped_never_takes_the_run_along(
    tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tiny_model, write_jsonl(chat_rows), export_to=("merged",))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(planned, "make", broken)
        done = drive(run, tmp_path / "broken")
    assert done.result is not None
    assert done.result.outcome == "done"
    finding = [event for event in done.of(Finding) if event.detector == "export"][-1]
    assert (finding.severity, finding.advice) == ("warn", ("qlora-tui export broken --to merged",))
    assert finding.message == "the export to merged failed: ZeroDivisionError; the adapter is whole"
    asked = Asked()
    monkeypatch.setattr(planned, "_Teller", lambda say: _Stopper(asked))
    done = drive(run, tmp_path / "stopped", asked)
    assert done.result is not None
    assert done.result.outcome == "done"
    assert [event.message for event in done.of(Finding) if event.detector == "export"] == [
        "the export to merged was stopped; the adapter is whole"
    ]
    assert inside(tmp_path / "stopped" / "export") == []
    assert (tmp_path / "stopped" / "adapter" / "adapter_model.safetensors").is_file()


class _Stopper:
    """Asks for a stop as soon as an export is under way."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def note(self, done: int, total: int, what: str) -> None:
        self.asked.at_step[0] = "stop"


# The command


def command(*words: object) -> int:
    return main(["export", *map(str, words)])


def test_the_command_exports_and_says_where_and_how_to_use_it(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(source.folder)
    journal.write(Saved(3, "adapter", 1, "adapter"))
    journal.close()
    assert command(source.folder, "--to", "merged") == 0
    said = capsys.readouterr().out
    out = source.folder / "export" / "merged"
    assert said.splitlines()[0].startswith(f"merged  {out}")
    assert "parity  passed: 6 held-out rows by transformers" in said
    assert f"use     vllm serve {out}" in said
    assert command(source.folder, "--to", "merged") == 2
    assert "an export replaces nothing" in capsys.readouterr().err
    assert command(source.folder, "--to", "adapter", "--out", tmp_path / "a", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "a" / "export.json").read_text())
    assert document["files"]["adapter_model.safetensors"] > 0
    assert "## Exports" in (source.folder / report.REPORT).read_text()


def test_a_report_that_cannot_be_written_takes_no_export_along(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(source.folder)
    journal.write(Saved(3, "adapter", 1, "adapter"))
    journal.close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert command(source.folder, "--to", "adapter", "--out", tmp_path / "a") == 0
    said = capsys.readouterr()
    assert "the report could not be written anew" in said.err
    assert "parity  passed" in said.out


def test_the_command_ends_with_1_when_the_gate_refuses(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(adapter: Path, base: Path, shards: list[str], out: Path, *_: object) -> None:
        for name in shards:
            shutil.copyfile(base / name, out / name)

    monkeypatch.setattr("qlora_tui.engine.export.merge.merge", merge)
    assert command(source.folder, "--to", "merged", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "REFUSED" in said
    assert "it is the base, without the adapter" in said
    assert f"{tmp_path / 'out.failed'}" in said
    assert "use " not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_leaves_nothing(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("qlora_tui.engine.export.merge.merge", lambda *_: os.kill(os.getpid(), number))
    assert command(source.folder, "--to", "merged", "--out", tmp_path / "to" / "out") == code
    assert "the export was stopped: nothing half-made stays" in capsys.readouterr().err
    assert inside(tmp_path / "to") == []
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--to", "merge"], "--to: no target 'merge'; did you mean merged?"),
        (["--to", "zip"], "there are adapter, merged, gguf, ollama"),
        (["--to", "merged", "--type", "f16"], "no type 'f16' of merged; merged keeps the types of its weights"),
        (["--to", "gguf", "--type", "q9"], "no type 'q9' of gguf; gguf has f16, q8_0"),
        ([], "--to"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(
    source: Source, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert command(source.folder, *words) == 2
    assert sentence in capsys.readouterr().err


def test_types_are_those_of_the_target() -> None:
    assert kind_of(target_of("gguf"), "", "") == "f16"
    assert kind_of(target_of("merged"), "", "") == ""
