"""Foreign text is words and nothing else, wherever it is shown: a new widget is one line in `SURFACES`."""

from __future__ import annotations

import contextlib
import html
import io
import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from canned_run import QuietDesk
from corpus import ATTACKS, FIRST, LAST, bad_characters, dressed, told
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import events as ev
from qlora_tui.engine import report
from qlora_tui.engine.data import Piece
from qlora_tui.engine.errors import ConfigError, ConfigErrors, EngineError, Problem
from qlora_tui.engine.journal import Journal
from qlora_tui.engine.judge import (
    Answered,
    Endpoint,
    Judgement,
    Sheet,
    begin_answers,
    keep_answer,
    keep_judgement,
    prices_of,
    read_pairs,
    todo,
)
from qlora_tui.engine.judge.kept import Call
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, safe_text
from qlora_tui.tui import cli
from qlora_tui.tui.commands import judge as judging
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.panels.base import View
from qlora_tui.tui.panels.device import DevicePanel
from qlora_tui.tui.panels.findings import FindingsPanel
from qlora_tui.tui.panels.log import LogPanel
from qlora_tui.tui.panels.loss import LossPanel
from qlora_tui.tui.panels.memory import MemoryPanel
from qlora_tui.tui.panels.samples import SamplesPanel
from qlora_tui.tui.panels.scorecard import ScorecardPanel
from qlora_tui.tui.panels.status import StatusLine
from qlora_tui.tui.panels.summary import SummaryPanel
from qlora_tui.tui.printer import Output, Printer, table
from qlora_tui.tui.scoring import Scored
from qlora_tui.tui.screens import go, pairlines, rows, triage, xray
from qlora_tui.tui.screens.command import equivalent
from qlora_tui.tui.state import RunState, fold_all
from qlora_tui.tui.writtenrows import WrittenRow

WIDTH, HEIGHT = 40_000, 60  # wide enough that nothing is cut before it could be seen


def records(events: Iterable[ev.Event]) -> list[ev.Record]:
    return [ev.Record(1, number, 1.0 * number, event) for number, event in enumerate(events, 1)]


def state_of(text: str, *, ended: bool = True) -> RunState:
    last: list[ev.Event] = [ev.Finished("failed", 1, text, adapter=text, report=text)] if ended else []
    return fold_all(records([*told(text), *last]))


def panel(kind: type, *, ended: bool = True, **view: Any) -> Callable[[str, Path], str]:
    """Return a surface that draws one panel of the run screen, its frame included."""

    def shown(text: str, _folder: Path) -> str:
        made, state = kind(id=None), state_of(text, ended=ended)
        look = View(now=state.t + 1.0, folder=safe_text(text), **view)
        return f"{made.heading(state, look).plain}\n{made.draw(state, look, WIDTH, HEIGHT).plain}"

    return shown


def lines(made: Iterable[Any]) -> str:
    return "\n".join(line.plain if hasattr(line, "plain") else str(line) for line in made)


def data_page(**more: Any) -> Callable[[str, Path], str]:
    def shown(text: str, _folder: Path) -> str:
        fields: dict[str, Any] = {"format": "messages", "why": text, "samples": ((text, text),), "faults": (text,), "refused": 1}
        fields |= {"repeated": ((0.5, text, text),), "rows": 9, "tokens": 900} | dict.fromkeys(more, text)
        return lines(xray.found_lines(DataLook((text,), **fields), RunConfig(data=(text,)), WIDTH, HEIGHT))

    return shown


def go_page(text: str, _folder: Path) -> str:
    run = RunConfig(model_name_or_path=text, data=(text,), eval_data=text, runs_dir=text)
    return lines(go.summary(run, None, DataLook((text,), rows=3), equivalent(run), WIDTH))


def row_page(text: str, _folder: Path) -> str:
    pieces = (Piece(text, True, False), Piece(text, False, True))
    return lines(rows.lines_of(WrittenRow(1, 9, 5, pieces), WIDTH, mark=">")) + lines(
        rows.lines_of(WrittenRow(1, fault=text), WIDTH, mark=">")
    )


def triage_page(text: str, _folder: Path) -> str:
    return lines(triage.scored_lines(Scored(9, ((1.5, 1), (9.0, 2))), RunConfig(), 3.0, WIDTH, {1: text, 2: text}))


def pair_page(text: str, folder: Path) -> str:
    answer = Answered(1, text, text, text, f"{text}!")
    shown = lines(pairlines.pair_lines(answer, True, WIDTH, opened=True)) + lines(pairlines.pair_lines(answer, False, 60))
    judge_run(text, folder)
    return shown + lines(pairlines.summary_lines(read_pairs(folder), WIDTH))


def judge_run(text: str, folder: Path) -> None:
    """Write a run whose answers were judged by an endpoint with a foreign name."""
    (folder / "run.toml").write_text("")
    begin_answers(folder, Sheet(text, 1, 9, 1, text))
    answer = Answered(1, text, text, text, f"{text}!")
    keep_answer(folder, answer)
    for first in ("base", "tuned"):
        keep_judgement(folder, Judgement(answer.pair, 1, text, "tuned", Call(first, "tuned")))


def judged_report(text: str, folder: Path) -> str:
    judge_run(text, folder)
    return report.write(folder, records(told("x"))).read_text(encoding="utf-8")


def judged_command(text: str, folder: Path) -> str:
    """What `judge` says of what leaves the machine, and of what was judged."""
    judge_run(text, folder)
    pairs, out = read_pairs(folder), io.StringIO()
    streams = type("Streams", (), {"data": Output(out), "talk": Output(out)})()
    endpoint = Endpoint(f"https://host/{text}", text)
    for line in judging._what_goes(pairs, todo(pairs, "another"), endpoint, prices_of(text, None, None), (0.0, 1.0, 1.0)):
        streams.talk.line(line)
    judging._tell(folder, streams, as_json=False)
    for body in (json.dumps({"error": {"message": text}}), text):
        with contextlib.suppress(EngineError):
            out.write(f"{endpoint._said(body.encode('utf-8', 'replace'))}\n")
    return out.getvalue()


def no_ui(text: str, folder: Path) -> str:
    """The lines of `--no-ui`, at a terminal too, where a bar is drawn."""
    out = io.StringIO()
    streams = type("Streams", (), {"data": Output(out), "talk": Output(out)})()
    streams.talk.terminal = True
    printer = Printer(streams, folder)
    for record in records([*told(text), ev.Finished("failed", 1, text, adapter=text, report=text)]):
        printer.show(record)
    return out.getvalue().replace("\r\x1b[K", "")  # our own bar


def report_page(text: str, folder: Path) -> str:
    return report.write(folder, records([*told(text), ev.Finished("failed", 1, text, adapter=text)])).read_text(encoding="utf-8")


def report_file(text: str, folder: Path) -> str:
    report_page(text, folder)
    return html.unescape((folder / report.PAGE).read_text(encoding="utf-8"))


def command(*words: str, put: Callable[[str, Path], object] | None = None) -> Callable[[str, Path], str]:
    """Return a surface that types a command with the text in the place of `{}` and returns all that it says."""

    def shown(text: str, folder: Path) -> str:
        if put is not None:
            put(text, folder)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
            cli.main([word.replace("{}", text) for word in words])
        return out.getvalue() + err.getvalue()

    return shown


def file_name(text: str) -> str:
    possible = "".join(char for char in text if char not in "/\0" and not "\ud800" <= char < "\udc80" and not "\udcff" < char < "\ue000")
    name = possible.encode("utf-8", "surrogateescape")[:120]
    return name.decode("utf-8", "ignore") + LAST


def write_rows(text: str, folder: Path) -> None:
    fine = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    bad = [{"messages": [{"role": text, "content": text}]}, {text: text}, {"messages": text}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in [fine, *bad]))


def write_run(text: str, folder: Path) -> None:
    """Write a run whose folder's name is foreign too."""
    home = folder / "runs" / file_name(text)
    home.mkdir(parents=True)
    (home / "run.toml").write_text("")
    journal = Journal(home)
    for event in told(text):
        journal.write(event)
    journal.close()


def write_log(text: str, folder: Path) -> None:
    state = {"log_history": [{"step": 1, "loss": 1.0, text: text}, {"step": text, "loss": text}], text: text}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_config(text: str, folder: Path) -> None:
    (folder / "run.toml").write_text(f"model_name_or_path = {json.dumps(safe_text(text))}\n{json.dumps(text)} = 1\n")


def write_foreign(text: str, folder: Path) -> None:
    """Write another tool's config whose keys and values are foreign."""
    config = {"dataset_name": text, "use_peft": True, "optim": text, text: True}
    (folder / "config.json").write_text(json.dumps(config))


def imported_run(text: str, folder: Path) -> str:
    """The remarks in the run.toml that an import writes; its values are data, as they were given."""
    write_foreign(text, folder)
    command("import", "config.json")(text, folder)
    written = (folder / "run.toml").read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in written if not line.startswith(("data = ", "runs_dir")))


def error_of(text: str, _folder: Path) -> str:
    err = io.StringIO()
    errors = [ConfigError(text, hint=text, where=text), ConfigErrors([Problem(text, text, text)] * 2)]
    with contextlib.redirect_stderr(err):
        for error in errors:
            cli._tell(error)
    return err.getvalue()


SURFACES: dict[str, Callable[[str, Path], str]] = {
    "run screen: status": panel(StatusLine, ended=False),
    "run screen: status at the end": panel(StatusLine),
    "run screen: summary for a tiny terminal": panel(SummaryPanel, ended=False),
    "run screen: loss": panel(LossPanel),
    "run screen: what it is doing before the first step": panel(LossPanel, ended=False),
    "run screen: memory": panel(MemoryPanel, zoomed="memory"),
    "run screen: device": panel(DevicePanel),
    "run screen: device alone": panel(DevicePanel, zoomed="device"),
    "run screen: warnings": panel(FindingsPanel),
    "run screen: warnings alone": panel(FindingsPanel, zoomed="findings"),
    "run screen: log": panel(LogPanel),
    "run screen: samples": panel(SamplesPanel, zoomed="samples"),
    "run screen: result": panel(ScorecardPanel),
    "wizard: data": data_page(),
    "wizard: data that cannot be read": data_page(problem=True, hint=True),
    "wizard: go": go_page,
    "wizard: a row": row_page,
    "wizard: answers that the base knows": triage_page,
    "side by side": pair_page,
    "judge": judged_command,
    "a run to judge": command("judge", "{}"),
    "an endpoint": command("judge", "last", "--endpoint", "{}", "--judge-model", "x", put=write_run),
    "a judge": command("judge", "last", "--endpoint", "https://host/v1", "--key-env", "{}", "--judge-model", "x", put=write_run),
    "a price": command("judge", "last", "--max-cost", "{}"),
    "report.md of judged answers": judged_report,
    "lines of --no-ui": no_ui,
    "report.md": report_page,
    "report.html": report_file,
    "a table": lambda text, _: table(("head",), [(text,)]),
    "an error": error_of,
    "attach --no-ui": command("attach", "last", "--no-ui", put=write_run),
    "runs": command("runs", put=write_run),
    "data": command("data", "rows.jsonl", put=write_rows),
    "data --examples": command("data", "rows.jsonl", "--examples", "2", put=write_rows),
    "data that is not there": command("data", "{}"),
    "import": command("import", "config.json", "--dry-run", put=write_foreign),
    "import --json": command("import", "config.json", "--dry-run", "--json", put=write_foreign),
    "the run.toml of an import": imported_run,
    "import of what is not there": command("import", "{}"),
    "watch": command("watch", "trainer_state.json", put=write_log),
    "watch of what is not there": command("watch", "{}"),
    "presets NAME": command("presets", "{}"),
    "a command that there is not": command("{}"),
    "an option that there is not": command("--{}", "x"),
    "a key that there is not": command("--set", "{}=1"),
    "a value that cannot be": command("--set", "lora_r={}"),
    "a config file": command("--no-ui", "--config", "run.toml", put=write_config),
    "a config file that is not there": command("--no-ui", "--config", "{}"),
    "a model that is not there": command("--no-ui", "--model", "{}", "--data", "builtin:python-docs"),
    "a model, looked at": command("budget", "--model", "{}"),
    "a card": command("budget", "--preset", "demo", "--card", "{}"),
    "a run to go on with": command("--no-ui", "--resume", "{}"),
    "a run to look at": command("attach", "{}"),
    "a run to serve": command("serve", "--attach", "{}"),
    "a host to serve": command("serve", "--host", "{}"),
}
"""Every place that shows text of others, as a function of that text and an empty folder."""

NAMELESS = {
    "a judge",
    "a config file",
    "run screen: loss",
    "run screen: memory",
    "run screen: device alone",
    "run screen: device",
    "watch",
    "runs",
}
"""Surfaces that need not show the text at all, or only the first part of a long one."""


MANY_LINES = {"wizard: a row", "side by side", "an error"}
"""A row keeps its line breaks, behind a margin; an error may have lines of ours, so whoever raises it makes its foreign parts one line."""


@pytest.mark.parametrize("name", SURFACES)
def test_foreign_text_is_shown_as_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    wrong: dict[str, object] = {}
    for number, (attempt, attack) in enumerate(ATTACKS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            shown = SURFACES[name](dressed(attack), folder)
        except Exception as error:  # noqa: BLE001  all of a surface's faults are told at once
            wrong[attempt] = f"{type(error).__name__}: {str(error)[:100]!r} at {traceback.extract_tb(error.__traceback__)[-1]}"
            continue
        if found := bad_characters(shown):
            wrong[attempt] = found
        if FIRST not in shown and LAST not in shown and name not in NAMELESS:
            wrong[attempt] = f"the words are gone: {shown[:300]!r}"
        forged = [line for line in shown.splitlines() if line.startswith("FORGED")]
        if forged and name not in MANY_LINES:
            wrong[attempt] = forged
    assert wrong == {}, wrong


def test_markup_is_shown_as_it_was_written(tmp_path: Path) -> None:
    for attempt in ("bold", "click", "link in markup", "unbalanced", "style names", "rich emoji"):
        for name in ("run screen: log", "run screen: warnings alone", "wizard: go", "wizard: data", "wizard: a row", "an error"):
            assert ATTACKS[attempt] in SURFACES[name](dressed(ATTACKS[attempt]), tmp_path), (attempt, name)


def test_a_table_of_attacks_is_an_attack() -> None:
    """Each would be noticed if it came through: the test above can fail."""
    harmless = {name for name, attack in ATTACKS.items() if not bad_characters(attack)}
    visible = {"bold", "click", "click with brackets", "link in markup", "unbalanced", "backslashes", "style names", "rich emoji"}
    assert harmless == visible | {"percent and braces", "html", "wide", "very long", "carriage return"}


@given(st.text(st.characters()))
def test_no_text_at_all_comes_through(text: str) -> None:
    assert bad_characters(safe_text(text)) == set()
    assert "\n" not in one_line(text)


def test_words_of_the_world_stay_as_they_are() -> None:
    for word in ("Tiếng Việt", "हिन्दी", "ภาษาไทย", "עִבְרִית", "العَرَبِيَّة", "e\u0301te\u0301", "👩‍👩‍👧‍👦", "Zürich"):
        assert safe_text(word) == word


def test_the_desk_of_the_tests_is_a_desk() -> None:
    assert QuietDesk().machine().name
