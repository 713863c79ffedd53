"""What the key `notify` may say: a bell, a command, or an address to post to. Reading alone; `notify` does it.

An address that is itself a secret (Slack's, Discord's) never stands in a config, which is kept with the run and shown:
it is named by an environment variable.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qlora_tui.engine.errors import Problem

KEY = "notify"
BY_NAME = "--set 'notify=webhook:$QLORA_WEBHOOK'"
_SECRET_HOSTS = ("hooks.slack.com", "discord.com", "discordapp.com", "webhook.office.com", "api.telegram.org", "chat.googleapis.com")
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Hook:
    """One thing to do at the end of a run; `rest` is the command line or the address, in its own words."""

    kind: Literal["bell", "command", "webhook"]
    rest: str = ""

    @property
    def variable(self) -> str:
        """Return the name of the environment variable that holds the address, or nothing."""
        return self.rest[1:].strip("{}") if self.kind == "webhook" and self.rest.startswith("$") else ""


def read(text: str) -> Hook:
    """Read one entry of `notify`.

    Raises:
        ValueError: it is none; the message is for people and holds nothing of the text.
    """
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    if kind == "bell" and not rest:
        return Hook("bell")
    if kind == "command" and _words(rest):
        return Hook("command", rest)
    if kind == "webhook" and rest.startswith("$"):
        if not re.fullmatch(r"\$(\w+|\{\w+\})", rest, re.ASCII):
            raise ValueError("after webhook:$ comes the name of an environment variable")
        return Hook("webhook", rest)
    if kind == "webhook" and is_address(rest):
        return Hook("webhook", rest)
    raise ValueError("it is neither bell, command:PROGRAM, webhook:$NAME nor webhook:https://...")


def words_of(hook: Hook) -> list[str]:
    """Return the words of a command, split as a shell would; no shell ever sees them."""
    return _words(hook.rest)


def is_address(text: str) -> bool:
    """Say whether `text` is an http or https address."""
    from urllib.parse import urlsplit  # 4 ms, for the few who use it

    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text
    except ValueError:
        return False


def is_loopback(url: str) -> bool:
    """Say whether `url` names this machine itself."""
    import ipaddress
    from urllib.parse import urlsplit

    host = urlsplit(url.strip()).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def carries_secret(address: str) -> bool:
    """Say whether whoever reads `address` could post there too: a known kind of host, a password, a query, or a part like a token."""
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    host = (parts.hostname or "").lower()
    if parts.username or parts.password or parts.query or any(host == one or host.endswith(f".{one}") for one in _SECRET_HOSTS):
        return True
    return any(_like_a_token(part) for part in parts.path.split("/"))


def faults(entries: Iterable[str]) -> list[Problem]:
    """Return what is wrong with the entries of `notify`, as far as their words tell; an address is never repeated."""
    found = []
    for number, text in enumerate(entries, 1):
        where = f"{KEY}, entry {number}"
        try:
            hook = read(text)
        except ValueError as error:
            found.append(Problem(where, str(error), "such as bell, command:notify-send done, or webhook:https://ntfy.sh/my-runs"))
            continue
        if hook.kind == "webhook" and not hook.variable and carries_secret(hook.rest):
            told = "this address works as a password, and a run keeps and shows its settings"
            found.append(Problem(where, told, f"export it, such as QLORA_WEBHOOK=..., and say {BY_NAME}"))
    return found


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an open quote
        return []


def _like_a_token(part: str) -> bool:
    return len(part) >= _SHORTEST_TOKEN and any(map(str.isdigit, part)) and any(map(str.isalpha, part))
