"""Notifications: what may be asked, that no secret is kept, that foreign text stays data, and that no failure changes a run."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_run import PATIENCE, RUN, checked, crashing, deaf, raising, three_steps
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import hooks, notify, preset
from qlora_tui.engine.errors import ConfigErrors, WontFit
from qlora_tui.engine.events import Finished
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.rules import problems
from qlora_tui.engine.session import LOG, Session

SLACK = "https://hooks.slack.com/services/T0000/B0000/abcdefabcdef"
WRITER = "import json, os, sys; json.dump({k: v for k, v in os.environ.items() if k.startswith('QLORA_')}, open(sys.argv[1], 'w'))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "20261125-164012-test"
    path.mkdir(parents=True, mode=0o700)
    return path


class Site:
    """A server on loopback that keeps what is posted."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.status, self.answer, self.looks = 200, threading.Event(), list[str]()
        self.answer.set()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                site.posts.append((dict(self.headers), body))
                site.answer.wait(PATIENCE)
                self.send_response(site.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                site.looks.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.answer.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Site()
    yield found
    found.close()


def ended(folder: Path, train: Any, *entries: str) -> Session:
    session = Session(replace(RUN, notify=entries), checked(), folder=folder, train=train)
    session.start()
    assert session.wait(PATIENCE)
    return session


def log_of(folder: Path) -> str:
    return (folder / LOG).read_text()


def command(folder: Path) -> tuple[str, Path]:
    """Return a notification that writes the facts it got into a file."""
    script, out = folder.parent / "write.py", folder.parent / "facts.json"
    script.write_text(WRITER)
    return f"command:{sys.executable} {script} {out}", out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bel", "neither bell"),
        ("bell:loud", "neither bell"),
        ("command:", "neither bell"),
        ("command:say 'open", "neither bell"),
        ("webhook:ftp://x/y", "neither bell"),
        ("webhook:$", "name of an environment variable"),
        ("webhook:$A B", "name of an environment variable"),
        (f"webhook:{SLACK}", "works as a password"),
        ("webhook:https://discord.com/api/webhooks/1/x", "works as a password"),
        ("webhook:https://user:pw@example.com/x", "works as a password"),
        ("webhook:https://gotify.home/message?token=abc", "works as a password"),
        ("webhook:https://ntfy.sh/x7Kq9mZ2pL0aBcDe", "works as a password"),
    ],
)
def test_what_cannot_be_done_or_must_not_be_kept_is_refused_without_repeating_it(text: str, told: str) -> None:
    found = problems(replace(RUN, notify=("bell", text)))
    assert [problem.where for problem in found] == ["notify, entry 2"]
    assert told in found[0].message
    assert text.partition(":")[2] not in str(found[0]) or len(text) < 12


@pytest.mark.parametrize(
    "text",
    [
        "bell",
        "command:sh -c 'echo hi'",
        "webhook:$SLACK",
        "webhook:${SLACK}",
        "webhook:https://ntfy.sh/my-runs",
        "webhook:http://nas:8080/x",
    ],
)
def test_what_can_be_done_is_accepted(text: str) -> None:
    assert problems(replace(RUN, notify=(text,))) == []


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for kind in ("", "webhook:", "webhook:https://", "command:"):
        assert len(hooks.faults([kind + text])) <= 1


def test_a_secret_never_enters_a_config(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'notify = ["webhook:{SLACK}"]')
    with pytest.raises(ConfigErrors) as caught:
        preset.resolve(config=path)
    assert "abcdef" not in str(caught.value)
    with pytest.raises(ConfigErrors):
        preset.resolve(flags={"notify": (f"webhook:{SLACK}",)})


def test_a_program_or_a_variable_that_is_not_there_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_WEBHOOK", SLACK)
    monkeypatch.setenv("NO_ADDRESS", "hello")
    run = replace(
        RUN, notify=("webhook:$QLORA_WEBHOOK", "webhook:$NO_ADDRESS", "webhook:$NOT_SET", "command:no-such-program x", "command:sh")
    )
    assert [problem.where[-1] for problem in notify.unready(run)] == ["2", "3", "4"]


def test_a_command_gets_the_facts_as_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_VERDICT", "from an older run")
    entry, out = command(folder)
    assert ended(folder, three_steps, entry).exit_code == 0
    facts = json.loads(out.read_text())
    assert facts["QLORA_RUN"] == folder.name
    assert (facts["QLORA_OUTCOME"], facts["QLORA_EXIT_CODE"], facts["QLORA_STEP"]) == ("done", "0", "3")
    assert (facts["QLORA_LOSS"], facts["QLORA_BASE_LOSS"], facts["QLORA_HELD_OUT_LOSS"]) == ("3.9700", "4.6000", "2.8000")
    assert facts["QLORA_VERDICT"] == "a measurable improvement"
    assert facts["QLORA_ADAPTER"] == str(folder / "adapter")


@pytest.mark.parametrize(("train", "outcome"), [(crashing, "failed"), (raising(WontFit("too large")), "will_not_fit")])
def test_every_end_is_told_and_foreign_text_stays_data(folder: Path, train: Any, outcome: str) -> None:
    entry, out = command(folder)
    ended(folder, train, entry)
    facts = json.loads(out.read_text())
    assert facts["QLORA_OUTCOME"] == outcome
    assert not {"\x1b", "\x07"} & set(facts["QLORA_REASON"])
    assert "hf_aaaa" not in facts["QLORA_REASON"]
    assert facts["QLORA_VERDICT"] == ""


def test_foreign_words_in_a_reason_are_never_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    entry, out = command(folder)
    ended(folder, raising(ValueError(f"$(touch {trap}); `touch {trap}` ' \" ; touch {trap}")), entry)
    assert "touch" in json.loads(out.read_text())["QLORA_REASON"]
    assert not trap.exists()


def test_a_webhook_gets_a_small_document_that_chats_understand(folder: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HOOK", site.address)
    ended(folder, three_steps, "webhook:$MY_HOOK")
    [(headers, body)] = site.posts
    found = json.loads(body)
    assert headers["Content-Type"] == "application/json"
    assert found["text"] == found["content"] == found["message"]
    assert f"{folder.name} done: all 3 steps done" in found["text"]
    assert "held-out loss 4.6000 -> 2.8000. a measurable improvement" in found["text"]
    assert (found["run"], found["outcome"], found["exit_code"]) == (folder.name, "done", "0")
    kept = "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    assert site.address not in kept
    assert "notified by webhook" in kept


def test_a_server_on_this_machine_is_asked_without_a_proxy(folder: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    ended(folder, three_steps, f"webhook:{site.address}")
    assert len(site.posts) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_post_that_is_sent_on_is_not_taken_for_one_that_arrived(folder: Path, site: Site, status: int) -> None:
    site.status = status
    ended(folder, three_steps, f"webhook:{site.address}")
    assert f"the notification by webhook failed: the server answered {status}" in log_of(folder)
    assert site.looks == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_refuses_is_a_line_in_the_log_and_nothing_more(folder: Path, site: Site, status: int) -> None:
    site.status = status
    session = ended(folder, three_steps, f"webhook:{site.address}", "command:false")
    assert session.exit_code == 0
    assert f"the notification by webhook failed: the server answered {status}" in log_of(folder)
    assert "the notification by command failed: it ended with code 1" in log_of(folder)
    assert [record.event.outcome for record in read_records(folder / EVENTS) if isinstance(record.event, Finished)] == ["done"]


def test_nobody_there_is_a_line_in_the_log(folder: Path, site: Site) -> None:
    site.close()
    assert ended(folder, three_steps, f"webhook:{site.address}").exit_code == 0
    assert "the notification by webhook failed" in log_of(folder)
    assert site.address not in log_of(folder)


def test_a_server_that_never_answers_is_left(folder: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "WEBHOOK_SECONDS", 0.2)
    site.answer.clear()
    assert ended(folder, three_steps, f"webhook:{site.address}").exit_code == 0
    assert "failed: TimeoutError" in log_of(folder)


def test_a_name_server_that_never_answers_is_left_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    monkeypatch.setitem(notify._DO, "bell", lambda hook, facts: str(let_go.wait(PATIENCE)))
    run = replace(RUN, notify=("bell",))
    notify.tell(run, notify.Facts(folder), Finished("done", 0, "done"), seconds=0.1)
    assert not let_go.is_set()
    let_go.set()


def test_a_command_that_hangs_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "COMMAND_SECONDS", 0.5)
    assert ended(folder, three_steps, "command:sleep 600").exit_code == 0
    assert "it did not end within" in log_of(folder)


def test_the_bell_rings_on_the_terminal_and_only_there(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr(notify, "TERMINAL", os.ttyname(theirs))
    ended(folder, three_steps, "bell")
    assert os.read(ours, 10) == b"\a"
    os.close(ours)
    os.close(theirs)
    monkeypatch.setattr(notify, "TERMINAL", str(tmp_path / "none"))
    other = folder.with_name("other")
    other.mkdir()
    assert ended(other, three_steps, "bell").exit_code == 0
    assert "this process has no terminal" in log_of(other)


def test_nothing_is_told_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_tell_all", lambda *_: pytest.fail("nobody asked"))
    assert ended(folder, three_steps).exit_code == 0


def test_a_run_that_hangs_is_told_before_the_process_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, out = command(folder)
    session = Session(replace(RUN, notify=(entry,)), checked(), folder=folder, train=deaf)
    left: list[int] = []

    def leave(code: int) -> None:
        left.append(code)
        raise SystemExit

    monkeypatch.setattr("qlora_tui.engine.session.os._exit", leave)
    with pytest.raises(SystemExit):
        session.end_now(1, told="no sign of life for 2 min")
    assert left == [1]
    assert json.loads(out.read_text())["QLORA_REASON"].startswith("no sign of life")
    session._lock.release()
    session._journal.close()
