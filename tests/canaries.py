"""Keys that must be found nowhere, and a witness of every connection that a process tries."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CANARIES: Mapping[str, str] = {
    "HF_TOKEN": "hf_" + "c4nary" * 5,
    "HUGGING_FACE_HUB_TOKEN": "old-canary-of-the-hub",
    "OPENAI_API_KEY": "sk-" + "c4naryopenai" * 3,
    "ANTHROPIC_API_KEY": "canary-of-another-lab",
    "WANDB_API_KEY": "0123456789abcdefcanary0123456789abcdef00",
    "AWS_ACCESS_KEY_ID": "AKIA" + "CANARY7" * 2 + "QQ",
    "AWS_SECRET_ACCESS_KEY": "secret/canary+of+the+cloud",
    "AWS_SESSION_TOKEN": "session-canary-of-the-cloud",
    "GITHUB_TOKEN": "ghp_" + "c4nary" * 6,
    "TRACKIO_TOKEN": "canary-of-a-tracker",
    "SMTP_PASSWORD": "canary-of-the-mail",
    "JUDGE_KEY": "canary-of-a-judge",
}
"""One that looks like a key, or one that only its variable gives away."""

_GUARD = """
import os, socket
_seen = os.environ["QLORA_TUI_TEST_WITNESS"]
def _told(what):
    with open(_seen, "a") as file:
        file.write(f"{os.getpid()} {what}\\n")
def _guarded(name):
    inner = getattr(socket.socket, name)
    def guarded(self, *arguments):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _told(f"{name} {arguments[-1]}")
        return inner(self, *arguments)
    setattr(socket.socket, name, guarded)
for _name in ("connect", "connect_ex", "sendto"):
    _guarded(_name)
_inner = socket.getaddrinfo
def _resolved(host, *arguments, **more):
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        _told(f"getaddrinfo {host}")
    return _inner(host, *arguments, **more)
socket.getaddrinfo = _resolved
"""
"""Taken by every Python process that starts, children of children too: what it connects to, sends to or looks up is written down."""


class Proxy:
    """A proxy on loopback that refuses everything and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _refuse(self) -> None:
                proxy.asked.append(f"{self.command} {self.path}")
                self.send_error(403)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        for verb in ("CONNECT", "GET", "POST", "HEAD", "PUT"):
            setattr(Handler, f"do_{verb}", Handler._refuse)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"


@contextmanager
def watched(tmp_path: Path) -> Iterator[tuple[Proxy, Path, dict[str, str]]]:
    """Lend a proxy, the witness's file and the environment that sends every process to them; the hub is not told to be offline."""
    place = tmp_path / "witness"
    place.mkdir()
    (place / "sitecustomize.py").write_text(_GUARD)
    seen = place / "seen.txt"
    seen.touch()
    proxy = Proxy()
    proxy._thread.start()
    names = ("http_proxy", "https_proxy", "all_proxy")
    proxies = {spelled: proxy.url for name in names for spelled in (name, name.upper())}
    environment = environment_of(tmp_path, PYTHONPATH=os.pathsep.join((str(place), str(ROOT / ".pkg"))), **proxies)
    try:
        yield proxy, seen, environment | {"QLORA_TUI_TEST_WITNESS": str(seen)}
    finally:
        proxy._server.shutdown()
        proxy._thread.join()
        proxy._server.server_close()


def environment_of(tmp_path: Path, **more: str) -> dict[str, str]:
    """Return an environment with every canary in it and a home of its own, so that all that is written can be looked through."""
    home = tmp_path / "user"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    places = {"HOME": str(home), "QLORA_TUI_HOME": str(home / "qlora"), "HF_HOME": str(home / "hf"), "TMPDIR": str(home)}
    usual = {"PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | places | usual | dict(CANARIES) | more


def leaks(texts: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Return which canary is where: as it is, by halves, or in base 64."""
    found = []
    for name, value in CANARIES.items():
        half = len(value) * 2 // 3
        forms = {value[:half].encode(), value[-half:].encode(), base64.b64encode(value.encode())}
        found += [(name, where) for where, text in texts.items() if any(form in text for form in forms)]
    return found


def files_below(*folders: Path) -> dict[str, bytes]:
    """Return what every file below `folders` holds, and its own path."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.read_bytes() + str(path).encode() for path in paths}
