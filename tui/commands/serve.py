"""`qlora-tui serve`: the screens in a browser on this machine, or through an SSH tunnel to it."""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_tui.engine.errors import ConfigError, ExitCode
from qlora_tui.engine.runs import RUNNING, RunInfo, find_run, list_runs
from qlora_tui.engine.text import one_line
from qlora_tui.tui.commands.settings import resolved
from qlora_tui.tui.printer import Streams

_HOSTS = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
_OURS = ("--attach", "--port", "--host")  # options of this command that take a value; tabs get the others
_EXTRA = ("textual_serve", "aiohttp")


def serve(options: argparse.Namespace) -> int:
    """Serve the screens until Ctrl+C; a run that was started in a tab goes on after the tab and the server.

    Raises:
        ConfigError: the extra is missing, another host than this machine is named, the port is taken, or the options
            do not make a run.
    """
    if any(importlib.util.find_spec(name) is None for name in _EXTRA):
        raise ConfigError("the browser's half is not installed", hint="pip install 'qlora-tui[web]'")
    if options.host not in _HOSTS:
        hint = "from another machine use an SSH tunnel: leave --host out, the command to type is shown then"
        raise ConfigError(f"{one_line(options.host)}: only this machine itself is served", hint=hint, where="--host")
    if options.readonly and not options.attach:
        raise ConfigError("looks at one run only", hint="name it with --attach", where="--readonly")
    run = resolved(options)
    followed = find_run(options.attach, Path(run.runs_dir).expanduser()).resolve() if options.attach else None
    from qlora_tui.tui.web import server

    site = server.Site(tab_words(options, followed, Path(run.runs_dir).expanduser()))
    server.run(site, _HOSTS[options.host], options.port, _say(site.url))
    for info in _running(Path(run.runs_dir).expanduser()):
        Streams().talk.line(f"run {info.id} goes on; qlora-tui attach {info.id} shows it")
    return int(ExitCode.DONE)


def tab_words(options: argparse.Namespace, followed: Path | None, runs_dir: Path) -> Callable[[bool], Sequence[str]]:
    """Return what says how a tab begins: on the run that was named, else on one that is going on, else with the wizard.

    So whoever closes a tab and opens the address again sees their run, and not a second wizard.
    """
    screen = [word for word, wanted in (("--no-mouse", options.no_mouse), ("--ascii", options.ascii)) if wanted]

    def words(new: bool) -> Sequence[str]:
        if followed is not None and not new:
            return ["attach", str(followed), *screen, *(["--readonly"] if options.readonly else [])]
        going = [] if new else _running(runs_dir)
        if going:
            return ["attach", str(going[0].path.resolve()), *screen]
        return _theirs(options.words)

    return words


def _theirs(words: Sequence[str]) -> list[str]:
    """Return the options that are a run's, as they were typed."""
    kept: list[str] = []
    given = iter(words)
    for word in given:
        if word in _OURS:
            next(given, None)
        elif word.partition("=")[0] not in (*_OURS, "--readonly"):
            kept.append(word)
    return kept


def _running(runs_dir: Path) -> list[RunInfo]:
    return [info for info in list_runs(runs_dir) if info.state == RUNNING]


def _say(url: Callable[[str, int], str]) -> Callable[[str, int], None]:
    """Return what prints the address on stdout, and how to reach it on stderr."""

    def said(host: str, port: int) -> None:
        streams = Streams()
        streams.data.line(url(host, port))
        shown = f"[{host}]" if ":" in host else host
        streams.talk.line("open this address in a browser here; whoever has it can start and stop runs as you")
        streams.talk.line(f"from another machine first:  ssh -L {port}:{shown}:{port} {_login()}")
        streams.talk.line("Ctrl+C ends the server and never a run")

    return said


def _login() -> str:
    """Return user@machine as the other end of an SSH connection knows it, where there is one."""
    told = os.environ.get("SSH_CONNECTION", "").split()
    where = told[2] if len(told) == 4 else socket.gethostname()
    try:
        return one_line(f"{getpass.getuser()}@{where}", limit=200)
    except (KeyError, OSError):  # a container's user without a name
        return one_line(where, limit=200)
