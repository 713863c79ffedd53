"""Tell somebody that a run has ended: ring, run a command, post to an address.

The process that owns the run does it, after the last word is on disk. Nothing that goes wrong here changes how the run
ended: it is a line in the log.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.engine import child, hooks
from qlora_tui.engine.errors import Problem
from qlora_tui.engine.events import Evaluated, Event, Finished, Stepped
from qlora_tui.engine.hooks import Hook
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, redact

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

TERMINAL = "/dev/tty"
WEBHOOK_SECONDS = 10.0
COMMAND_SECONDS = 30.0
MOST_SECONDS = 45.0
"""All notifications together: a name server that does not answer is under no other limit."""
_log = logging.getLogger("qlora_tui.notify")


class Facts:
    """What a notification says of a run; told of every event, it keeps the last of each kind."""

    def __init__(self, folder: Path) -> None:
        """Speak of the run in `folder`, from now on."""
        self._folder, self._began = folder, time.monotonic()
        self._step: Stepped | None = None
        self._measured: Evaluated | None = None

    def see(self, event: Event) -> None:
        """Remember what counts; cheap, since the owner thread calls it."""
        if isinstance(event, Stepped):
            self._step = event
        elif isinstance(event, Evaluated):
            self._measured = event

    def variables(self, word: Finished) -> dict[str, str]:
        """Return the facts as environment variables; what is not known is empty, so that nothing older shows through."""
        step, measured = self._step, self._measured
        facts: dict[str, Any] = {
            "RUN": self._folder.name,
            "FOLDER": self._folder.resolve(),
            "OUTCOME": word.outcome,
            "EXIT_CODE": word.exit_code,
            "REASON": redact(word.reason),
            "STEP": step.step if step else "",
            "TOTAL_STEPS": step.total_steps if step else "",
            "LOSS": f"{step.loss:.4f}" if step else "",
            "HELD_OUT_LOSS": f"{measured.loss:.4f}" if measured else "",
            "BASE_LOSS": f"{measured.base_loss:.4f}" if measured and measured.base_loss is not None else "",
            "VERDICT": measured.verdict if measured else "",
            "ADAPTER": self._folder.resolve() / word.adapter if word.adapter else "",
            "SECONDS": round(time.monotonic() - self._began),
        }
        return {f"QLORA_{name}": one_line(value, limit=2000) for name, value in facts.items()}


def unready(run: RunConfig) -> list[Problem]:
    """Return why a notification could not be made from here: no such program, or a variable that holds no address."""
    found = []
    for number, text in enumerate(run.notify, 1):
        where = f"{hooks.KEY}, entry {number}"
        try:
            hook = hooks.read(text)
        except ValueError:  # told by `rules`
            continue
        program = hooks.words_of(hook)[0] if hook.kind == "command" else ""
        if "/" in program and not program.startswith("/"):
            told = f"{one_line(program)!r} depends on the folder that the run is started from"
            found.append(Problem(where, told, "name the program by its whole path"))
        elif program and shutil.which(program) is None:
            found.append(Problem(where, f"there is no program {one_line(program)!r}", "name one that is installed, with its path"))
        if hook.variable and not hooks.is_address(os.environ.get(hook.variable, "")):
            told = f"the environment variable {hook.variable} holds no http address"
            found.append(Problem(where, told, f"export {hook.variable}=https://..."))
    return found


def tell(run: RunConfig, facts: Facts, word: Finished, *, seconds: float = MOST_SECONDS) -> None:
    """Make all notifications, for `seconds` at most; never raises."""
    if not run.notify:
        return
    teller = threading.Thread(target=_tell_all, args=(run.notify, facts, word), name="notify", daemon=True)
    try:
        teller.start()
    except RuntimeError as error:  # no more threads
        _log.warning("nobody was notified: %s", error)
        return
    teller.join(seconds)
    if teller.is_alive():
        _log.warning("notifications took more than %.0f s and were left", seconds)


def sentence(facts: Mapping[str, str]) -> str:
    """Return what a person reads on a phone: which run, how it ended, whether it helped."""
    said = facts["QLORA_REASON"]
    ended = said if said.startswith(facts["QLORA_OUTCOME"]) else f"{facts['QLORA_OUTCOME']}: {said}"
    lines = [f"{facts['QLORA_RUN']} {ended}"]
    if facts["QLORA_BASE_LOSS"]:
        lines.append(f"held-out loss {facts['QLORA_BASE_LOSS']} -> {facts['QLORA_HELD_OUT_LOSS']}. {facts['QLORA_VERDICT']}".strip())
    elif facts["QLORA_LOSS"]:
        lines.append(f"step {facts['QLORA_STEP']} of {facts['QLORA_TOTAL_STEPS']}, loss {facts['QLORA_LOSS']}")
    return "\n".join(lines)


def _tell_all(entries: tuple[str, ...], known: Facts, word: Finished) -> None:
    facts = known.variables(word)
    for text in entries:
        kind = text.partition(":")[0]
        try:
            fault = _DO[kind](hooks.read(text), facts)
        except Exception as error:  # noqa: BLE001  whatever a notification raises, the run has ended as it has
            fault = f"{type(error).__name__}: {error}"
        if fault:
            _log.warning("the notification by %s failed: %s", one_line(kind, limit=20), _without_addresses(fault, entries))
        else:
            _log.info("notified by %s", one_line(kind, limit=20))


def _bell(hook: Hook, facts: Mapping[str, str]) -> str:
    """Ring the terminal of this process, whatever its streams are; one without, such as a detached run, cannot."""
    try:
        terminal = os.open(TERMINAL, os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return "this process has no terminal"
    try:
        os.write(terminal, b"\a")
    finally:
        os.close(terminal)
    return ""


def _command(hook: Hook, facts: Mapping[str, str]) -> str:
    """Run a program; what is foreign reaches it as environment variables and never as part of a command line."""
    ended = child.run(hooks.words_of(hook), doing="notifying", env=facts, seconds=COMMAND_SECONDS)
    if ended.code < 0:
        return f"it did not end within {COMMAND_SECONDS:.0f} s, or a signal ended it"
    return f"it ended with code {ended.code}: {ended.last_words}" if ended.code else ""


def _webhook(hook: Hook, facts: Mapping[str, str]) -> str:
    """Post a small JSON document: `text` is what Slack reads, `content` Discord, `message` Gotify; ntfy.sh gets plain text."""
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import Request

    address = _address(hook)
    if not hooks.is_address(address):
        return f"the environment variable {hook.variable} holds no http address"
    text, title = sentence(facts), f"qlora-tui: {facts['QLORA_OUTCOME']}"
    if urlsplit(address).hostname == "ntfy.sh":
        body, kind = text.encode(), "text/plain; charset=utf-8"
    else:
        about = {
            name.removeprefix("QLORA_").lower(): facts[name] for name in ("QLORA_RUN", "QLORA_OUTCOME", "QLORA_EXIT_CODE", "QLORA_LOSS")
        }
        body, kind = json.dumps({"text": text, "content": text, "message": text, "title": title, **about}).encode(), "application/json"
    request = Request(address, body, {"Content-Type": kind, "Title": title, "User-Agent": "qlora-tui"}, method="POST")
    try:
        with _opener(address).open(request, timeout=WEBHOOK_SECONDS):
            return ""
    except HTTPError as error:
        error.close()
        return f"the server answered {error.code} {error.reason}"


def _opener(address: str) -> OpenerDirector:
    """Return what posts to `address` alone: it follows nothing, since a post that is sent on arrives as a question without its text.

    This machine is asked without a proxy, which could not reach it.
    """
    from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

    class Nowhere(HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            """Leave the answer as it is: an error."""

    return build_opener(ProxyHandler({} if hooks.is_loopback(address) else None), Nowhere)


def _address(hook: Hook) -> str:
    return os.environ.get(hook.variable, "") if hook.variable else hook.rest


def _without_addresses(fault: str, entries: tuple[str, ...]) -> str:
    """Return what went wrong without the addresses themselves, which may be secrets."""
    for text in entries:
        address = _address(hooks.read(text)) if text.startswith("webhook:") else ""
        fault = fault.replace(address, "[address]") if address else fault
    return redact(one_line(fault))


_DO = {"bell": _bell, "command": _command, "webhook": _webhook}
