"""`qlora-tui watch`: logs of ours and of other tools, and files that are none."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.events import Evaluated, Event, Finding, Record, Resumed, RolledBack, Started, Stepped, encode
from qlora_tui.engine.watch import HeldRow, Setting, Watch
from qlora_tui.engine.watch.logs import read_log
from qlora_tui.engine.watch.replay import Back, Held, replay
from qlora_tui.tui.cli import main

Capture = pytest.CaptureFixture[str]
Write = Callable[[str, str], Path]
STEPS = 80
JUMP = 61


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def loss_of(step: int, *, ill: bool) -> float:
    return 9.0 if ill and step >= JUMP else 1.8 - step / 200 + (step % 5) / 50


def csv_of(*, ill: bool) -> str:
    lines = [f"{step},{loss_of(step, ill=ill):.4f},{8.0 if ill and step >= JUMP else 1.0}" for step in range(1, STEPS + 1)]
    return "\n".join(["step,loss,grad_norm", *lines]) + "\n"


def trainer_of(*, ill: bool) -> str:
    history = [{"step": step, "loss": loss_of(step, ill=ill), "grad_norm": 1.0, "epoch": step / 40} for step in range(1, STEPS + 1)]
    return json.dumps({"global_step": STEPS, "log_history": [*history, {"step": STEPS, "train_runtime": 1.0}]})


def journal_of(*events: Event) -> str:
    return "".join(encode(Record(1, number, float(number), event)) + "\n" for number, event in enumerate(events, 1))


def stepped(step: int, loss: float, norm: float = 1.0) -> Stepped:
    return Stepped(step, STEPS, step / 40, loss, norm, False, False, 1e-3, 100, 50, 1.0, 0.0, tuple(range(16)))


def ours(*, ill: bool, **config: object) -> list[Event]:
    steps = [stepped(step, loss_of(step, ill=ill), 8.0 if ill and step >= JUMP else 1.0) for step in range(1, STEPS + 1)]
    return [Started("r", config, {}, {}), *steps]


def test_a_healthy_csv_has_nothing_to_stop_it_for(write: Write, capsys: Capture) -> None:
    assert main(["watch", str(write("log.csv", csv_of(ill=False)))]) == 0
    told = capsys.readouterr().out
    assert told.startswith("80 steps of a CSV\n")
    assert told.endswith("nothing to stop it for\n")


@pytest.mark.parametrize("name", ["log.csv", "trainer_state.json", "events.jsonl"])
def test_each_kind_of_log_is_judged_and_exits_4(write: Write, capsys: Capture, name: str) -> None:
    text = {"log.csv": csv_of(ill=True), "trainer_state.json": trainer_of(ill=True), "events.jsonl": journal_of(*ours(ill=True))}[name]
    if name == "trainer_state.json":
        text = text.replace('"grad_norm": 1.0, ', "")
    assert main(["watch", str(write(name, text)), "--batch", "16", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["stop_step"] == JUMP + 1
    assert found["steps"] == JUMP + 1
    (stop,) = [finding for finding in found["findings"] if finding["severity"] == "stop"]
    assert stop["detector"] == "spike"
    assert stop["advice"]
    assert "rule" in stop["numbers"]


def test_people_read_rule_and_advice(write: Write, capsys: Capture) -> None:
    assert main(["watch", str(write("log.csv", csv_of(ill=True)))]) == 4
    told = capsys.readouterr().out
    assert "STOP at step 63, spike: loss 9.00 is" in told  # one step a row, as far as the log says: judged with more care
    assert "\n    half the learning rate" in told
    assert "\n    rule: loss over the median" in told
    assert told.endswith("it would have been stopped at step 63\n")


def test_a_folder_and_a_run_by_name_are_logs_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    write("runs/a-run/events.jsonl", journal_of(*ours(ill=False)))
    write("out/trainer_state.json", trainer_of(ill=False))
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a-run", "a-run", "last", "out"):
        assert main(["watch", name]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_is_judged_by_its_own_choice_of_stops(write: Write, capsys: Capture) -> None:
    path = write("events.jsonl", journal_of(*ours(ill=True, watch_stop=["drift", "of a later version"])))
    assert main(["watch", str(path), "--json"]) == 4
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert next((found["detector"], found["severity"]) for found in findings if found["severity"] != "info") == ("spike", "warn")
    assert findings[-1]["detector"] == "drift"


def test_held_out_rows_of_a_run_are_read_and_asked(write: Write) -> None:
    rows = "".join(json.dumps({"row": row, "nll": 20.0 + row, "tokens": 20}) + "\n" for row in range(24))
    for name in ("base", "step-000062"):
        write(f"run/eval/{name}.jsonl", rows)
    events = ours(ill=True)
    base, asked = Evaluated(0, 1.6, 24, 0.1, "eval/base.jsonl"), Evaluated(JUMP + 1, 1.6, 24, 0.1, "eval/step-000062.jsonl")
    events.insert(1, base)
    events.insert(JUMP + 3, asked)
    log = read_log(write("run/events.jsonl", journal_of(*events)))
    assert [moment.rows[0] for moment in log.moments if isinstance(moment, Held)] == [HeldRow(1.0, 20)] * 2
    told = replay(log.moments, Watch(Setting(0, 0, 16)))
    assert told.stop_step is None
    assert [finding for finding in told.findings if "the rows changed, not the model" in finding.message]


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "", "eval", "eval/broken.jsonl", "eval/none.jsonl", "\0"])
def test_a_path_in_a_log_never_leads_out_and_a_broken_one_is_left_out(write: Write, name: str) -> None:
    write("secret.jsonl", json.dumps({"row": 1, "nll": 1.0, "tokens": 1}))
    write("run/eval/broken.jsonl", '{"row": 1, "nll": 1.0, "tokens": 0}\n')
    log = read_log(write("run/events.jsonl", journal_of(Evaluated(0, 1.6, 24, 0.1, name), stepped(1, 1.0))))
    assert next(moment.rows for moment in log.moments if isinstance(moment, Held)) == []


@pytest.mark.parametrize("back", [Resumed(40), RolledBack(40, 0.5, 1)])
def test_what_a_resume_made_void_is_not_judged(write: Write, back: Event) -> None:
    events = ours(ill=True)
    again = [stepped(step, loss_of(step, ill=False)) for step in range(41, STEPS + 1)]
    log = read_log(write("events.jsonl", journal_of(*events, back, *again)))
    assert replay(log.moments, Watch(Setting(0, 0, 16))).stop_step is None


def test_steps_that_go_back_in_a_csv_are_a_resume(write: Write) -> None:
    text = csv_of(ill=True) + "".join(f"{step},{loss_of(step, ill=False):.4f},1.0\n" for step in range(41, STEPS + 1))
    log = read_log(write("log.csv", text))
    assert [moment for moment in log.moments if isinstance(moment, Back)] == [Back(40)]
    assert replay(log.moments, Watch(Setting(0, 0, 16))).stop_step is None


def test_other_tools_names_and_missing_cells_are_understood(write: Write) -> None:
    text = "Epoch,Global_Step,train/loss,val_loss,LR,extra\n0.1,10,1.5,,1e-4,x\n0.2,20,,1.4,1e-4\n0.3,30,nan,1.3,,y,z,more\n"
    log = read_log(write("log.csv", text))
    first, held, second, last = log.moments
    assert isinstance(first, Stepped)
    assert (first.step, first.loss, first.lr, first.grad_norm) == (10, 1.5, 1e-4, -1.0)
    assert isinstance(held, Held)
    assert held.found.loss == 1.4
    assert isinstance(second, Stepped)
    assert math.isnan(second.loss)
    assert second.skipped
    assert isinstance(last, Held)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("log.csv", "", "its first line names no step and loss"),
        ("log.csv", "a,b\n1,2\n", "its first line names no step and loss"),
        ("log.csv", "step,loss\n", "it holds no step with a loss"),
        ("log.csv", "step,loss\n1,one\n", "line 2: loss is 'one', no number"),
        ("log.csv", "step,loss\n1.5,1\n", "line 2: its step is no whole number"),
        ("log.csv", "step,loss\n-1,1\n", "line 2: its step is no whole number"),
        ("log.csv", "step,loss\nnan,1\n", "line 2: its step is no whole number"),
        ("log.csv", "step,loss\n1e300,1\n", "line 2: its step is no whole number"),
        ("log.csv", "step,loss\n,1\n", "line 2: its step is no whole number"),
        ("log.csv", 'step,loss\n1,"' + "9" * 100_000 + '"\n', "line 2: loss is '9999"),
        ("log.csv", "step,loss\n1,\x1b]52;c;AAAA\x07\n", r"loss is '\x1b]52;c;AAAA\x07', no number"),
        ("trainer_state.json", "{", "it is no JSON"),
        ("trainer_state.json", "[]", "it has no log_history"),
        ("trainer_state.json", '{"log_history": [1]}', "it has no log_history"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": true}]}', "entry 1: loss is True, no number"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": {}}]}', "entry 1: loss is {}, no number"),
        ("trainer_state.json", '{"log_history": [{"loss": 1.0}]}', "entry 1: its step is no whole number"),
        ("trainer_state.json", "[" * 100_000, "it cannot be read"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": ' + "9" * 5000 + "}]}", "it cannot be read"),
        ("events.jsonl", "\n\nrubbish\n{}\n", "it holds no step with a loss"),
        ("events.jsonl", '{"v": 99, "type": "stepped"}\n', "newer qlora-tui"),
        ("log.txt", "step,loss\n1,1\n", "its name says no kind of log"),
        ("empty/keep", "", "no such file"),
    ],
)
def test_a_file_that_is_no_log_gets_one_sentence(write: Write, capsys: Capture, name: str, text: str, sentence: str) -> None:
    path = write(name, text)
    assert main(["watch", str(path if name != "empty/keep" else path.with_name("gone.csv"))]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert "\x1b" not in told.err
    assert told.out == ""


def test_bytes_that_are_no_text_and_a_folder_without_a_log_get_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "log.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")
    assert main(["watch", str(tmp_path / "log.csv")]) == 2
    assert main(["watch", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "it cannot be read" in told
    assert "no events.jsonl or trainer_state.json in this folder" in told


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["log.csv", "trainer_state.json", "events.jsonl"]))
def test_rubbish_is_a_sentence_or_a_log(tmp_path: Path, rubbish: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"step,loss\n" + rubbish if name == "log.csv" else rubbish)
    with contextlib.suppress(EngineError):
        told = replay(read_log(path).moments, Watch(Setting()))
        assert all(isinstance(finding, Finding) for finding in told.findings)
