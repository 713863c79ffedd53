"""What a run says at its end: rows that got worse, manner or content, what it forgot, what it only memorised; and `qlora-tui eval`."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loop_driver import Asked, drive

from qlora_tui.engine import evaluate, forgetting
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.events import Evaluated, Event, Finding, Phase, Probed
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import checks, question
from qlora_tui.tui import cli

Make = Callable[..., RunConfig]


def nonsense(write_jsonl: Callable[..., Path], rows: int) -> str:
    """Return a file of questions whose answers follow from nothing: they can be learned by heart and not otherwise."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(2 * rows)]
    made = [{"prompt": asked, "completion": answer} for asked, answer in zip(words[::2], words[1::2], strict=True)]
    return str(write_jsonl(made, "nonsense.jsonl"))


def test_a_run_ends_with_general_text_and_training_rows(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(final_checks=True, val_set_size=12.0), tmp_path / "run")
    other, general, trained = ran.of(Probed)
    assert (other.name, general.name, trained.name) == ("other_question", "general", "train")
    assert other.rows == 12
    assert (general.rows, trained.rows) == (len(forgetting.passages()), checks.LEAST_ROWS)
    assert all("licences" in general.about and probed.interval[0] < probed.drop < probed.interval[1] for probed in (general, trained))
    measured = [at for at, event in enumerate(ran.events) if isinstance(event, Evaluated) and not event.manner]
    assert ran.events.index(other) > max(measured)
    rows = [event for event in ran.of(Evaluated) if event.base_loss is not None][-1]
    assert trained.base_loss != rows.base_loss
    assert trained.drop == pytest.approx(trained.base_loss - trained.loss, abs=0.3)


def test_the_checks_change_nothing_of_the_adapter_and_can_be_left_out(run_of: Make, tmp_path: Path) -> None:
    run = run_of(final_checks=True, val_set_size=12.0)
    ran, without = drive(run, tmp_path / "run"), drive(dataclasses.replace(run, final_checks=False), tmp_path / "without")
    assert without.of(Probed) == []
    weights = [(one.folder / "adapter" / "adapter_model.safetensors").read_bytes() for one in (ran, without)]
    assert weights[0] == weights[1]
    assert (ran.result, ran.losses) == (without.result, without.losses)


def test_a_wish_to_stop_ends_the_checks_and_keeps_what_is_known(run_of: Make, tmp_path: Path) -> None:
    class Late(Asked):
        """Asks to stop once the checks have begun."""

        checking = False

        def urgent(self) -> str | None:
            return "stop" if self.checking else super().urgent()

    asked, said = Late(), []

    def note(event: Event) -> None:
        said.append(event)
        asked.checking = asked.checking or (isinstance(event, Phase) and event.note.startswith("held-out answers"))

    ran = drive(run_of(final_checks=True, val_set_size=12.0), tmp_path / "run", asked, on_event=note)
    assert ran.of(Probed) == []
    assert ran.result is not None
    assert ran.result.outcome == "done"
    assert ran.of(Evaluated)[-1].base_loss is not None


def test_rows_that_got_worse_are_told_with_their_words(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if training had done harm, and the more the higher a row's number."""
    honest, calls = evaluate.measure, [0]

    def measure(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        found = yield from honest(*args, **more)
        harm = 0.0 if calls[0] == 1 else 0.01
        return [dataclasses.replace(loss, nll=loss.nll + loss.tokens * (1 + loss.row * harm if harm else 0)) for loss in found]

    monkeypatch.setattr(evaluate, "measure", measure)
    ran = drive(run_of(final_checks=False, val_set_size=8.0, eval_steps=100, watch_stop=()), tmp_path / "run")
    first, last = ran.of(Evaluated)
    assert first.worst == ()
    assert len(last.worst) == evaluate.WORST
    lost = [row["loss"] - row["base_loss"] for row in last.worst]
    assert lost == sorted(lost, reverse=True)
    assert min(lost) > 0
    assert all(row["prompt"] == f"say {row['row'] - 1}" and row["answer"].startswith("abc ") for row in last.worst)
    assert json.loads(json.dumps(last.worst)) == [*last.worst]


def test_learning_by_heart_is_called_overfitted(run_of: Make, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    data = nonsense(write_jsonl, 32)
    steps = {"num_train_epochs": 100.0, "max_steps": 0, "eval_steps": 20, "save_steps": 100, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    rows = {"val_set_size": 24.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    ran = drive(run_of(final_checks=True, data=(data,), lora_r=64, lora_alpha=64, watch_stop=(), **steps, **rows), tmp_path / "run")
    (found,) = [finding for finding in ran.of(Finding) if finding.detector == "overfitted"]
    assert found.message.startswith("overfitted: training rows gained")
    assert found.numbers["train_drop"] > found.numbers["drop"] + 0.5


def spelled(write_jsonl: Callable[..., Path], *, shuffled: bool) -> str:
    """Return a file of questions that begin with the word which is the whole answer; or where the answers are dealt out anew."""
    draw, made = random.Random(3), []
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(4)]
    for _ in range(90):
        word = draw.choice(words)
        made.append((word + "".join(draw.choices("xyz", k=3)), word))
    answers = [answer for _, answer in made]
    if shuffled:
        draw.shuffle(answers)
    rows = [{"prompt": asked, "completion": answer} for (asked, _), answer in zip(made, answers, strict=True)]
    return str(write_jsonl(rows, f"spelled-{shuffled}.jsonl"))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_gain_of_manner_alone_is_no_improvement(
    run_of: Make, write_jsonl: Callable[..., Path], tmp_path: Path, *, shuffled: bool
) -> None:
    """The same words in the same number: only beside the right questions is there more than their manner to learn."""
    data = spelled(write_jsonl, shuffled=shuffled)
    steps = {"max_steps": 40, "eval_steps": 100, "save_steps": 100, "learning_rate": 1e-2, "watch_stop": ()}
    rows = {"val_set_size": 24.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    ran = drive(run_of(final_checks=True, data=(data,), lora_r=32, lora_alpha=64, **steps, **rows), tmp_path / "run")
    other = next(probed for probed in ran.of(Probed) if probed.name == "other_question")
    assert other.own_more is not None
    assert other.own_interval is not None
    honest, *again = [event for event in ran.of(Evaluated) if event.base_loss is not None]
    assert honest.verdict.startswith("a measurable improvement")
    named = [finding for finding in ran.of(Finding) if finding.detector == "manner"]
    if not shuffled:
        assert other.own_interval[0] > 0.05
        assert (named, again) == ([], [])
        return
    assert abs(other.own_more) < 0.02
    assert len(named) == 1
    assert again == [dataclasses.replace(honest, manner=True, verdict=again[0].verdict)]
    assert again[0].verdict.startswith("no clear improvement beyond manner")
    assert (other.drop, other.own_more) == pytest.approx((named[0].numbers["other_gain"], named[0].numbers["more"]))


def test_answers_after_other_questions_are_part_of_what_the_checks_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[TokenRow]):
        def at(self, places: Sequence[int]) -> list[TokenRow]:
            return [self[place] for place in places]

    rows = Rows(TokenRow(number, array("i", [1, number, number, 4, number]), b"\0\0\0\1\1") for number in range(20))
    counted = checks.checks_of(RunConfig(), rows, rows)  # type: ignore[arg-type]  # rows that are not in a store
    assert len(counted.pairs) == 20
    monkeypatch.setattr(question, "LEAST_PAIRS", 21)
    without = checks.checks_of(RunConfig(), rows, rows)  # type: ignore[arg-type]
    assert without.pairs == []
    assert counted.seconds(3.0) == pytest.approx(without.seconds(3.0) + 2 * 3.0)  # the pairs are as long as the rows, and measured twice


def held(*means: float) -> list[RowLoss]:
    return [RowLoss(row, 10 * mean, 10) for row, mean in enumerate(means)]


@pytest.mark.parametrize(
    ("trained", "newest", "best", "named"),
    [
        (3.0, 3.9, 3.2, True),  # far better on what it saw, and worse again on what it did not
        (3.0, 4.0, 4.0, True),  # gained nothing that is sure
        (3.0, 1.0, 1.0, False),  # held-out rows gained as much
        (1.2, 3.2, 3.2, False),  # the gap is small
    ],
)
def test_overfitted_needs_a_gap_and_a_hold_out_that_did_not_gain(trained: float, newest: float, best: float, *, named: bool) -> None:
    noise = [0.1 * (row % 5 - 2) for row in range(30)]
    base = held(*(4.0 + one for one in noise))
    spread = held(*(newest + one * 1.5 for one in noise))
    holdout = SimpleNamespace(base=base, newest=spread, best=held(*(best + one for one in noise)), best_step=4)
    card = evaluate.compare(base, held(*(4.0 - trained + one for one in noise)))
    found = checks.overfitted(SimpleNamespace(holdout=holdout, step=9), card)  # type: ignore[arg-type]
    assert (found is not None) is named


@pytest.mark.parametrize(("drop", "reach", "severity"), [(-0.3, 0.1, "warn"), (-0.05, 0.01, "info"), (-0.3, 0.4, None), (0.3, 0.1, None)])
def test_forgetting_is_told_where_it_is_more_than_noise(drop: float, reach: float, severity: str | None) -> None:
    card = evaluate.compare(held(1.0, 2.0), held(1.0, 2.0))
    found = checks.forgotten(9, dataclasses.replace(card, drop=drop, interval=(drop - reach, drop + reach)))
    assert (found.severity if found else None) == severity


@pytest.fixture
def finished(tiny_model: Path, chat_rows: list[dict[str, Any]], write_jsonl: Callable[..., Path], tmp_path: Path, capsys) -> Path:
    """A run that ended, made as a person makes one."""
    settings = ["method=lora", "max_length=256", "eval_steps=2", "learning_rate=5e-3", f"runs_dir={tmp_path / 'runs'}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    data = str(write_jsonl(chat_rows))
    assert cli.main(["--no-ui", "--model", str(tiny_model), "--data", data, "--max-steps", "4", *sets]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_eval_finds_the_runs_own_scorecard_again(finished: Path, capsys, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert cli.main(["eval", str(finished), "--json", "--checks"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = [event for event in events if event["type"] == "evaluated"][-1]
    promised = ("rows", "base_loss", "loss", "drop", "interval", "better_share", "verdict", "worst")
    assert {name: found[name] for name in promised} == {name: card[name] for name in promised}
    probed = [event for event in events if event["type"] == "probed"]
    assert [(one["name"], one["base_loss"], one["loss"]) for one in found["checks"]] == [
        (one["name"], one["base_loss"], one["loss"]) for one in probed
    ]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    assert cli.main(["eval", str(finished), "--best"]) == 0
    said = capsys.readouterr().out
    assert "the best by held-out loss, of step" in said
    assert "mean row" in said

    other = write_jsonl([{"prompt": f"tell {n}", "completion": "xyz " * (n % 5 + 1)} for n in range(12)], "other.jsonl")
    assert cli.main(["eval", str(finished), "--data", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["data"]) == (12, str(other))


def test_eval_says_what_it_does_not_check_or_what_the_run_found(finished: Path, capsys, write_jsonl: Callable[..., Path]) -> None:
    """A measurement without the checks never contradicts the run's own word on the same adapter and rows."""

    def said(*words: str) -> str:
        assert cli.main(["eval", str(finished), *words]) == 0
        return str(capsys.readouterr().out)

    def found(*, manner: bool) -> None:
        """Let the run itself have checked, and found that or not; four held-out rows are too few for it in truth."""
        events = [json.loads(line) for line in journal.splitlines()]
        card = next(event for event in reversed(events) if event["type"] == "evaluated")
        probed = next(event for event in events if event["type"] == "probed") | {"name": "other_question"}
        again = card | {"manner": True, "verdict": "no clear improvement beyond manner: as said"}
        events[-1:-1] = [probed, *([again] if manner else [])]
        (finished / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    journal = (finished / "events.jsonl").read_text()
    assert "not checked: whether more than the manner of the answers was learned; --checks measures that" in said()
    assert json.loads(said("--json"))["manner"] is None
    assert "not checked: whether more than the manner of the answers was learned; these rows are too few" in said("--checks")
    found(manner=True)
    assert "no clear improvement beyond manner: as said" in (told := said())
    assert "not checked" not in told
    assert json.loads(said("--json"))["manner"] is True
    other = str(write_jsonl([{"prompt": f"tell {n}", "completion": "xyz " * (n % 5 + 1)} for n in range(12)], "other.jsonl"))
    assert "not checked" in (told := said("--data", other))
    assert "as said" not in told
    found(manner=False)
    assert "not checked" not in said()
    assert json.loads(said("--json"))["manner"] is False


def test_eval_of_a_run_without_an_adapter_is_one_sentence(finished: Path, capsys) -> None:
    (finished / "adapter" / "adapter_model.safetensors").unlink()
    assert cli.main(["eval", str(finished)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has no adapter" in said


def test_ctrl_c_ends_an_evaluation(finished: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The signal comes when the owner says that it measures, and the main thread hears of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pressed: list[bool] = []

    def measure(*args: Any, **more: Any) -> Any:
        pressed or os.kill(os.getpid(), signal.SIGINT)
        pressed.append(True)
        while True:  # a long one: only the wish ends it
            args[3]()
            yield 0

    monkeypatch.setattr(evaluate, "measure", measure)
    assert cli.main(["eval", str(finished)]) == 130
    said = capsys.readouterr()
    assert "stopped: nothing was measured" in said.err
    assert said.out == ""
    assert list((tmp_path / "temporary").iterdir()) == []


def test_eval_refuses_an_adapter_of_another_model(finished: Path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    path = finished / "adapter" / "adapter_model.safetensors"
    save_file({name: part[:1].clone() for name, part in load_file(path).items()}, path)
    assert cli.main(["eval", str(finished)]) == 2
    assert "other layers or another rank" in capsys.readouterr().err
