"""The screens in a browser: who is answered, what a tab is, what survives it; in a real Chromium where there is one."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pty_screen import text_of

from qlora_tui.engine.events import Finished, Stepped
from qlora_tui.engine.journal import EVENTS, is_running, leave_wish, read_records
from qlora_tui.engine.runs import RUN_FILE, list_runs
from qlora_tui.tui import cli
from qlora_tui.tui.commands import serve

pytest.importorskip("textual_serve", reason="the extra `web` is not installed")
aiohttp = pytest.importorskip("aiohttp", reason="the extra `web` is not installed")

from aiohttp import WSServerHandshakeError, web  # noqa: E402  after the skip
from browser import CHROMIUM, browser  # noqa: E402

from qlora_tui.tui.web import server, tabs  # noqa: E402

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
ECHO = """
import fcntl, os, signal, sys, termios, tty
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
tty.setraw(0)
told = sys.argv[1]
def hang_up(number, frame):
    open(told, "w").write("hang-up")
    os._exit(0)
signal.signal(signal.SIGHUP, hang_up)
os.write(1, b"up %s " % os.environ["TERM"].encode())
while True:
    keys = os.read(0, 100)
    if keys == b"?":
        os.write(1, b"size %d %d " % os.get_terminal_size(0))
    elif keys == b"q":
        os.write(1, b"last words")
        sys.exit()
    else:
        os.write(1, keys.upper())
"""


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[tuple[server.Site, str]]:
    """A site on a free port whose tabs echo in capitals."""
    monkeypatch.setattr(tabs, "COMMAND", (sys.executable, "-c", ECHO))
    made = server.Site(lambda new: [str(tmp_path / ("new" if new else "told"))])
    async with running(made) as address:
        yield made, address


class running:  # noqa: N801  used as a function
    """A site, served while inside."""

    def __init__(self, site: server.Site) -> None:
        self.site = site

    async def __aenter__(self) -> str:
        self.runner = web.AppRunner(self.site.app(), access_log=None, shutdown_timeout=1.0)
        await self.runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self.runner, listener).start()
        return self.site.url("127.0.0.1", listener.getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        await self.site.hang_up()
        await self.runner.cleanup()
        for tab in (*self.site.tabs, *self.site.ended):
            if tab.process.poll() is None:
                tab.process.kill()
            tab.process.wait()


async def until(holds: Callable[[], bool], wait: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0.02)) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        await wait()


async def read_until(tab: Any, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        message = await tab.receive(PATIENCE)
        assert message.type is aiohttp.WSMsgType.BINARY, (message, seen)
        seen += message.data
    return seen


def open_tab(session: Any, address: str, **headers: str) -> Any:
    origin = {"Origin": address.rsplit("/", 2)[0]}
    return session.ws_connect(f"{address}ws?width=100&height=30", headers=origin | headers)


PATHS = ("", "new", "ws", "new/ws", "page.js", "static/js/textual.js", "static/", "nothing")


async def test_without_the_token_nothing_answers(site: tuple[server.Site, str]) -> None:
    made, address = site
    root = address.rsplit("/", 2)[0]
    wrong = ["", "/", "/static/js/textual.js", "/ws", "/%00", "/\u00e9/", f"/{made.token[:-1]}/", f"/{made.token}x/", f"//{made.token}/"]
    wrong += [f"/{'a' * len(made.token)}/{path}" for path in PATHS]
    async with aiohttp.ClientSession() as session:
        for path in wrong:
            async with session.get(root + path, headers={"Origin": root}) as answer:
                assert (path, answer.status, await answer.text()) == (path, 404, "not found")
        for path in ("", "new", "page.js", "page.css", "static/js/textual.js"):
            async with session.get(address + path) as answer:
                assert (path, answer.status) == (path, 200)
        for path in ("static/", "static/../server.py", "nothing"):
            async with session.get(address + path) as answer:
                assert answer.status in (403, 404)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "[bad", ""])
async def test_a_name_that_is_not_this_machines_is_not_answered(site: tuple[server.Site, str], host: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(site[1], headers={"Host": host}) as answer:
        assert answer.status in (400, 404)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:1", "https://127.0.0.1"])
async def test_a_page_of_another_site_opens_no_tab(site: tuple[server.Site, str], origin: str) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(WSServerHandshakeError) as refused:
            await open_tab(session, site[1], Origin=origin)
        assert refused.value.status == 404
    assert not site[0].tabs


async def test_through_a_tunnel_with_another_port_it_answers(site: tuple[server.Site, str]) -> None:
    """`ssh -L 9000:127.0.0.1:8417`: the browser says localhost:9000."""
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, site[1], Host="localhost:9000", Origin="http://localhost:9000")
        await read_until(tab, b"up xterm-256color")
        async with session.get(site[1], headers={"Host": "localhost:9000"}) as answer:
            assert f"ws://localhost:9000/{site[0].token}/ws" in await answer.text()


async def test_the_page_names_nothing_outside_and_forbids_it(site: tuple[server.Site, str]) -> None:
    async with aiohttp.ClientSession() as session, session.get(site[1]) as answer:
        text = await answer.text()
        policy = answer.headers["Content-Security-Policy"]
    here = site[1].split("//")[1].split("/")[0]
    assert {part.split("//")[1].split("/")[0] for part in text.split('"') if "//" in part} == {here}
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe-eval" not in policy
    assert (answer.headers["Referrer-Policy"], answer.headers["X-Frame-Options"]) == ("no-referrer", "DENY")


async def test_a_tab_is_a_terminal(site: tuple[server.Site, str], tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, site[1])
        await read_until(tab, b"up xterm-256color")
        await tab.send_json(["stdin", "?"])
        await read_until(tab, b"size 100 30 ")
        for nonsense in (
            "{",
            '"x"',
            "[]",
            '["stdin"]',
            '["stdin", 5]',
            '["resize", {"width": -1, "height": 1e9}]',
            '["quit"]',
            "[[[",
            "null",
        ):
            await tab.send_str(nonsense)
        await tab.send_bytes(b"\x00")
        await tab.send_json(["resize", {"width": 66, "height": 22}])
        await tab.send_json(["stdin", "?"])
        await read_until(tab, b"size 66 22 ")
        paste = "k\u00e4se" * 20_000
        await tab.send_json(["stdin", paste])
        seen = b""
        while len(seen) < len(paste.encode()):
            seen += (await tab.receive(PATIENCE)).data
        assert seen.startswith(b"K\xc3\xa4SE")
        await tab.send_json(["stdin", "q"])
        await read_until(tab, b"last words")
        assert (await tab.receive(PATIENCE)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert not (tmp_path / "told").exists()


async def test_closing_a_tab_is_a_hang_up(site: tuple[server.Site, str], tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        tab = await open_tab(session, site[1])
        await read_until(tab, b"up ")
        await tab.close()
    await until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text() == "hang-up")
    await until(lambda: not site[0].tabs)


async def test_there_is_an_end_to_tabs(site: tuple[server.Site, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TABS", 1)
    async with aiohttp.ClientSession() as session:
        first = await open_tab(session, site[1])
        await read_until(first, b"up ")
        with pytest.raises(WSServerHandshakeError) as refused:
            await open_tab(session, site[1])
        assert refused.value.status == 503
        await first.close()
        await until(lambda: not site[0].tabs)
        await read_until(await open_tab(session, site[1]), b"up ")


def test_a_tab_does_not_take_itself_for_the_servers_terminal() -> None:
    outer = {"TMUX": "x", "SSH_CONNECTION": "x", "TERM": "screen", "HOME": "/h", "COLUMNS": "9"}
    inner = tabs.environment(outer)
    assert {"TMUX", "SSH_CONNECTION", "COLUMNS"} & set(inner) == set()
    assert (inner["TERM"], inner["HOME"]) == ("xterm-256color", "/h")


def parsed(*words: str) -> argparse.Namespace:
    return cli.parse(["serve", *words])[1]


def test_a_tab_begins_with_the_run_that_goes_on_and_else_with_the_wizard(write_run: Any, tmp_path: Path) -> None:
    typed = ["--model", "a b", "--port", "0", "--set", "lora_r=8", "--data", "x;rm -rf $HOME.jsonl", "--host=::1", "--ascii"]
    words = serve.tab_words(parsed(*typed), None, tmp_path)
    theirs = ["--model", "a b", "--set", "lora_r=8", "--data", "x;rm -rf $HOME.jsonl", "--ascii"]
    assert words(False) == theirs
    folder, _, _ = write_run()
    (folder / RUN_FILE).write_text("")
    assert words(False) == ["attach", str(folder), "--ascii"]
    assert words(True) == theirs
    named = serve.tab_words(parsed("--attach", "last", "--readonly"), folder, tmp_path)
    assert named(False) == ["attach", str(folder), "--readonly"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "only this machine itself is served"),
        (["--host", "192.168.1.5"], "use an SSH tunnel"),
        (["--port", "eighty"], "is not a whole number"),
        (["--readonly"], "name it with --attach"),
        (["--attach", "nobody"], "nobody"),
        (["--set", "lora_r=many"], "lora_r"),
        (["--no-ui"], "unknown option --no-ui"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_taken_port_and_a_missing_extra_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
        assert f"port {port} cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve"]) == 2
    assert "pip install 'qlora-tui[web]'" in capsys.readouterr().err


def test_the_command_says_its_address_once_and_ends_with_ctrl_c(home: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".pkg"), "SSH_CONNECTION": "1.2.3.4 5 10.9.8.7 22", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qlora_tui.tui", "serve", "--port", "0"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        token = address.split("/")[3]
        seen = [(Path("/proc") / str(process.pid) / name).read_bytes() for name in ("cmdline", "environ")]
        assert [token.encode() in part for part in seen] == [False, False]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, out, len(token) > 40, token in err) == (0, "", True, False)
    port = address.split(":")[2].split("/")[0]
    assert f"ssh -L {port}:127.0.0.1:{port} " in err
    assert "@10.9.8.7" in err
    assert not [path for path in home.rglob("*") if path.is_file() and token in path.read_text(errors="replace")]


async def test_ctrl_c_ends_the_server_and_never_a_run(tmp_path: Path, home: Path) -> None:
    """The real command with a tab open on a run's screen; the run is this test's training, behind the tab's own terminal."""
    runs = tmp_path / "runs"
    runs.mkdir()
    path = os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")])
    driver = [sys.executable, str(ROOT / "tests" / "wizard_driver.py"), "until_asked", str(runs)]
    script = (
        f"from qlora_tui.tui.web import tabs\ntabs.COMMAND = {driver!r}\nfrom qlora_tui.tui import cli\ncli.main(['serve', '--port', '0'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with aiohttp.ClientSession() as session:
            tab = await open_tab(session, address)
            while not list_runs(runs):
                await tab.send_json(["stdin", "\r"])
                await tab.receive(PATIENCE)
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        folder = list_runs(runs)[0].path
        before = list_runs(runs)[0].step
        await until(lambda: list_runs(runs)[0].step > before + 20)
        assert is_running(folder)
        leave_wish(folder, "stop")
        await until(lambda: not is_running(folder))
        assert read_records(folder / EVENTS)[-1].event.outcome == "stopped"
    finally:
        process.kill()
        process.communicate()


def test_an_address_of_ip_version_6_is_written_in_brackets() -> None:
    site = server.Site(lambda new: [])
    assert site.url("::1", 5) == f"http://[::1]:5/{site.token}/"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
async def test_a_run_from_start_to_end_in_a_real_browser(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wizard is drawn, keys walk it, a run starts, outlives its tab, is shown again in another, and is stopped there."""
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setattr(tabs, "COMMAND", (sys.executable, str(ROOT / "tests" / "wizard_driver.py"), "until_asked", str(runs)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")]))
    site = server.Site(serve.tab_words(parsed(), None, runs))
    async with running(site) as address, browser(tmp_path / "profile") as new_page:
        page = await new_page()
        await page.open(address)
        await page.until(lambda: "goal" in text_of(page.drawn, (200, 60)))
        assert await page.evaluate("document.fonts.load('16px \"Roboto Mono\"').then(found => found.length)") > 0
        await page.until(lambda: len(set(page.drawn)) > 50)
        assert len(await page.picture()) > 10_000, "an empty page"
        for _ in range(60):
            if list_runs(runs):
                break
            drawn = len(page.drawn)
            await page.press("Enter")
            await page.until(lambda drawn=drawn: len(page.drawn) > drawn or bool(list_runs(runs)))
        folder = list_runs(runs)[0].path
        await page.until(lambda: "tok/s" in text_of(page.drawn, (200, 60)))
        outside = [name for name in page.addresses if not name.startswith((address, address.replace("http", "ws"), "data:"))]
        assert outside == []
        assert [told for told in page.complaints if "Content Security" in told or "404" in told] == []

        await page.call("Page.close")
        await until(lambda: not site.tabs)
        before = list_runs(runs)[0].step
        await until(lambda: list_runs(runs)[0].step > before + 20)
        assert is_running(folder)

        again = await new_page()
        await again.open(address)
        await again.until(lambda: "tok/s" in text_of(again.drawn, (200, 60)))
        await again.press("s")
        await again.until(lambda: "save" in text_of(again.drawn, (200, 60)))
        await again.press("Enter")
        await until(lambda: not is_running(folder))
    events = [record.event for record in read_records(folder / EVENTS)]
    assert (sum(isinstance(event, Finished) for event in events), events[-1].outcome) == (1, "stopped")
    assert sum(isinstance(event, Stepped) for event in events) > 20
