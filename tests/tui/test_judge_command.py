"""`judge` on the command line: what it refuses, what it says before anything is sent, what it asks, and what it leaves."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_judge import FakeJudge, Misbehave

from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.journal import Journal, RunLock
from qlora_tui.engine.judge import ME, Answered, Judgement, Sheet, begin_answers, keep_answer, keep_judgement, read_pairs
from qlora_tui.tui import answering, cli

FAR = ["--endpoint", "https://judge.example/v1", "--judge-model", "m"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose answers are there: seven pairs, one of them equal."""
    home = tmp_path / "runs" / "one"
    home.mkdir(parents=True)
    (home / "run.toml").write_text("")
    Journal(home).close()
    begin_answers(home, Sheet("a", 7, 64, 3, "qlora nf4 bfloat16"))
    for row in range(7):
        keep_answer(home, Answered(row, f"prompt {row}\nmore", "w", f"base {row}", f"base {row}" if row == 6 else f"tuned says {row}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answering, "make", lambda folder, rows, tokens, say, stopping: say(rows, rows))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return home


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with FakeJudge() as judge_server:
        yield judge_server


def far(server: FakeJudge) -> list[str]:
    return ["judge", "one", "--endpoint", server.url, "--judge-model", "m"]


class Keys(io.StringIO):
    """A terminal at which somebody has typed."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--by", "endpoint"], "no endpoint named"),
        (["--by", "me", *FAR], "contradict each other"),
        (["--judge-model", "m"], "--judge-model: it is about an endpoint, and none is named"),
        (["--max-cost", "0"], "--max-cost: it is about an endpoint"),
        (["--yes-send-data"], "--yes-send-data: it is about an endpoint"),
        (["--endpoint", "https://judge.example/v1"], "no model named to judge"),
        (FAR, "OPENAI_API_KEY is not set"),
        ([*FAR, "--key-env", "NOBODY_HAS_THIS"], "NOBODY_HAS_THIS is not set"),
        ([*FAR, "--price-in", "1"], "a price needs both directions"),
        (["--endpoint", "http://judge.example/v1", "--judge-model", "m"], "over plain http"),
        (["--max-cost", "much"], "is no amount of dollars"),
        (["--max-cost", "nan"], "is no amount of dollars"),
        (["--rows", "-1"], "is not a whole number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], fault: str
) -> None:
    monkeypatch.setattr(answering, "make", lambda *_: pytest.fail("made"))
    assert cli.main(["judge", "one", "--no-ui", *words]) == 2
    assert fault in capsys.readouterr().err


def test_without_an_endpoint_the_answers_are_made_and_what_is_known_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", "one", "--no-ui"]) == 0
    out, err = capsys.readouterr()
    assert out == "answers  7 of 7 held-out prompts, qlora nf4 bfloat16, 64 tokens at most\n"
    assert "base and tuned answer: 7 of 7 prompts" in err
    assert "nothing is judged yet; qlora-tui judge one shows" in err
    keep_judgement(folder, Judgement(read_pairs(folder).answers[0].pair, 0, ME, "tuned"))
    assert cli.main(["judge", "one", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["answered"], told["judges"][0]["judge"], told["judges"][0]["wins"]) == ("one", 7, "me", 1)
    assert "Which answers are better?" in (folder / "report.md").read_text()


def test_without_the_flag_nothing_is_sent_and_what_would_be_is_told(
    folder: Path, server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*far(server), "--no-ui"]) == 2
    out, err = capsys.readouterr()
    assert "nothing is sent without a word from you; say --yes-send-data" in err
    assert f"To {server.url[7:-3]} (this machine itself), for m to judge:" in err
    assert "6 held-out prompts with both answers, 12 questions" in err
    assert "row 0: prompt 0 more" in err
    assert "row 4" in err
    assert "row 5" not in err
    assert "and 1 more; all are in answers.jsonl" in err
    assert "1 pair of equal answers is not sent" in err
    assert (out, server.asked) == ("", [])


@pytest.mark.parametrize(("typed", "sent"), [("y\n", 12), ("yes\n", 12), ("n\n", 0), ("\n", 0), ("", 0), ("sure\n", 0)])
def test_a_person_is_asked(
    folder: Path, server: FakeJudge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, sent: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Keys(typed))
    assert cli.main(far(server)) == (0 if sent else 130)
    assert len(server.asked) == sent
    assert "send them? [y/N]" in capsys.readouterr().err


def test_an_endpoint_judges_and_a_second_start_asks_nothing(folder: Path, server: FakeJudge, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*far(server), "--no-ui", "--yes-send-data", "--price-in", "1", "--price-out", "10", "--max-cost", "1"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert f"judged   m at {server.url[7:-3]}: the tuned answers are preferred, win rate 93 %" in out
    assert "(6 tuned, 1 tie, 0 base" in out
    assert "at most about $0.1" in err
    assert "it stops before $1.00 in all" in err
    assert cli.main([*far(server), "--no-ui"]) == 0, "nothing is left to send, so nothing has to be allowed"
    assert len(server.asked) == 12
    assert "has judged all of these pairs" in capsys.readouterr().err
    report = (folder / "report.md").read_text()
    assert "Which answers are better?" in report
    assert "93 %" in report


def test_the_usual_price_is_an_upper_estimate_and_a_cap_ends_it_in_peace(
    folder: Path, server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*far(server), "--no-ui", "--yes-send-data", "--max-cost", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "at most about $1.20 ($0.20 a comparison, an upper estimate" in err
    assert "stopped after 5 of 12 replies: the next question could pass --max-cost; they are kept, and the same command goes on" in err
    assert len(server.asked) == 5
    assert "$0.50" in out


def test_a_refusal_is_told_and_what_came_before_it_is_kept(folder: Path, server: FakeJudge, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = [Misbehave(401, {"error": {"message": "no such key"}})]
    assert cli.main([*far(server), "--no-ui", "--yes-send-data"]) == 1
    err = capsys.readouterr().err
    assert "401: no such key; check the key" in err
    assert "stopped after 0 of 12 replies" in err


def test_ctrl_c_keeps_what_came(
    folder: Path, server: FakeJudge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [Misbehave(), Misbehave(503)]
    server.script[0].body = json.dumps({"choices": [{"message": {"content": "VERDICT: A"}}]}).encode()

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_tui.tui.commands.judge.time.sleep", interrupted)
    assert cli.main([*far(server), "--no-ui", "--yes-send-data"]) == 130
    assert "what was answered and judged so far is kept" in capsys.readouterr().err
    assert len(read_pairs(folder).judgements) == 1


def test_a_run_that_trains_and_one_that_cannot_be_loaded_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock(folder)
    assert cli.main(["judge", "one", "--no-ui"]) == 2
    assert "run one is running" in capsys.readouterr().err
    lock.release()

    def too_large(*_: object) -> None:
        raise WontFit("the device ran out of memory")

    monkeypatch.setattr(answering, "make", too_large)
    assert cli.main(["judge", "one", "--no-ui"]) == 3
    (folder / "run.toml").unlink()
    (folder / "events.jsonl").touch()
    assert cli.main(["judge", "one", "--no-ui"]) == 2
    assert "has no run.toml" in capsys.readouterr().err
