"""An OpenAI-compatible endpoint: one question, one reply, and nothing that goes anywhere else.

The standard library does the talking: the hub's own client changed from httpx to httpx2, so neither can be relied on. No redirect is
followed, since the key would go along; plain http is for this machine; the key is in a header of one request and in no text that
anybody sees. Waiting and retrying are in `patience`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

from qlora_tui.engine.aside import aside
from qlora_tui.engine.errors import ConfigError, EngineError, FetchError
from qlora_tui.engine.hooks import is_loopback
from qlora_tui.engine.judge.question import Message
from qlora_tui.engine.text import one_line, redact

USUAL_KEY = "OPENAI_API_KEY"
_PATH = "/chat/completions"
_LONGEST_REPLY = 1 << 20
_RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_SHOWN = 300
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Busy(FetchError):
    """The endpoint could not answer now; `after` is how many seconds it asks to wait, `sent` whether it may have worked on it."""

    def __init__(self, message: str, *, where: str = "", after: str = "", sent: bool = False) -> None:
        """Keep `after` as the header says it: seconds or a date."""
        self.after, self.sent = after, sent
        super().__init__(message, where=where)


class Refused(EngineError):
    """The endpoint will not answer this, however often it is asked."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the text, and the tokens that the endpoint says it took, None where it does not say."""

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass(slots=True)
class Endpoint:
    """Where to ask, which model, and with which key; `key` is never shown.

    Attributes:
        url: of the whole call, as `address` makes it.
        model: the judge.
        key: sent as a bearer token; empty for none.
        reply_tokens: what a reply may take at most.
        timeout: seconds for one question, everything included.
        stopping: called ten times a second; raises to interrupt.
        clock: seconds, for the timeout.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    reply_tokens: int = 1024
    timeout: float = 120.0
    stopping: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic
    _odd: dict[str, str | None] = field(default_factory=dict)  # parameters that this endpoint wants under another name, or not at all

    @property
    def host(self) -> str:
        """Return host and port, as a person checks where rows go."""
        return one_line(urlsplit(self.url).netloc)

    @property
    def name(self) -> str:
        """Return what judgements are kept under."""
        return f"{one_line(self.model, limit=100)} at {self.host}"

    def ask(self, question: list[Message]) -> Reply:
        """Return the reply to one question.

        Raises:
            Busy: another try may help.
            Refused: it will not.
            Stopped: or whatever else `stopping` raises.
        """
        for _ in range(3):  # as written here, and twice as this endpoint would rather have it
            try:
                return self._once(question)
            except _Odd as odd:
                self._odd[odd.name] = odd.instead
        raise Refused("it accepts none of the usual parameters", where=self.host)

    def _once(self, question: list[Message]) -> Reply:
        ends = self.clock() + self.timeout

        def look() -> None:
            self.stopping()
            if self.clock() > ends:
                raise Busy(f"no reply within {self.timeout:g} s", where=self.host, sent=True)

        status, headers, body = aside(lambda: self._send(self._body(question)), look)
        if status != http.client.OK:
            self._explain(status, headers, body)
        return self._read(body)

    def _body(self, question: list[Message]) -> bytes:
        wanted: dict[str, Any] = {"temperature": 0, "max_tokens": self.reply_tokens}
        chosen = {self._odd.get(name, name): value for name, value in wanted.items()}
        chosen.pop(None, None)
        return json.dumps({"model": self.model, "messages": question, **chosen}).encode("ascii")

    def _send(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "qlora-tui"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with self._opener().open(request, timeout=self.timeout) as answer:
                return answer.status, dict(answer.headers), answer.read(_LONGEST_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), _rest(error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused("its certificate is not valid for this name", where=self.host) from None
            sent = isinstance(error.reason, TimeoutError)
            raise Busy(f"it cannot be reached ({self.clean(error.reason)})", where=self.host, sent=sent) from None
        except TimeoutError:
            raise Busy(f"no reply within {self.timeout:g} s", where=self.host, sent=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise Busy(f"the connection broke off ({self.clean(error) or type(error).__name__})", where=self.host, sent=True) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        """Return what opens connections: through the person's proxy, but never to this machine, and without a file or ftp handler."""
        proxies = urllib.request.ProxyHandler({} if is_loopback(self.url) else None)
        opener = urllib.request.OpenerDirector()
        kinds = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), urllib.request.HTTPErrorProcessor())
        for handler in (proxies, *kinds, urllib.request.HTTPDefaultErrorHandler(), _NoRedirect(self)):
            opener.add_handler(handler)
        return opener

    def _explain(self, status: int, headers: Mapping[str, str], body: bytes) -> NoReturn:
        """Raise what a reply other than 200 means."""
        said = self._said(body)
        told = f"{status}{f': {said}' if said else ''}"
        if status in _RETRIED:
            raise Busy(told, where=self.host, after=next((value for name, value in headers.items() if name.lower() == "retry-after"), ""))
        if status in (400, 422):
            self._meet_halfway(said)
        hints = {
            401: "check the key in the environment variable",
            403: "check the key in the environment variable, and what it may do",
            404: f"check the address and the model {one_line(self.model, limit=100)}",
            402: "the account has no credit",
        }
        raise Refused(told, where=self.host, hint=hints.get(status, ""))

    def _meet_halfway(self, said: str) -> None:
        """Raise what to do otherwise where an endpoint knows one of our parameters under another name, or takes no other value."""
        if "max_completion_tokens" in said and "max_tokens" not in self._odd:
            raise _Odd("max_tokens", "max_completion_tokens")
        if "temperature" in said and "temperature" not in self._odd:
            raise _Odd("temperature", None)

    def _said(self, body: bytes) -> str:
        """Return an error's own words, safe to show."""
        words: Any = body.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(body)
            words = found.get("error", found.get("detail", "")) if isinstance(found, dict) else ""
            words = words.get("message", "") if isinstance(words, dict) else words
        return self.clean(words)

    def clean(self, words: object) -> str:
        """Return foreign words as one line without a secret in it; first the secrets go, so that no cut leaves half of one."""
        text = str(words)[:_LONGEST_REPLY]
        return one_line(redact(text.replace(self.key, "[redacted]") if self.key else text), limit=_SHOWN)

    def _read(self, body: bytes) -> Reply:
        try:
            found = json.loads(body)
            if found.get("error") and not found.get("choices"):  # some gateways answer 200 and an error
                code = found["error"].get("code") if isinstance(found["error"], dict) else 0
                self._explain(code if isinstance(code, int) else 500, {}, body)
            message = found["choices"][0]["message"]
            text = message.get("content") or ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Refused("it does not answer as an OpenAI-compatible endpoint does", where=self.host, hint="check the address") from None
        if not isinstance(text, str):
            text = ""
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Reply(text, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


class _Odd(Exception):
    """An endpoint wants the parameter `name` as `instead`, or not at all."""

    def __init__(self, name: str, instead: str | None) -> None:
        self.name, self.instead = name, instead


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: what is sent is for one host."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        fp.close()
        there = self._endpoint.clean(urlsplit(newurl).netloc)
        raise Refused(f"it sends us on to {there}, where neither key nor rows go", where=self._endpoint.host, hint="name that address")


def address(text: str, *, plain_http: bool = False) -> str:
    """Return the address of the call for an endpoint as people write it, such as `https://api.openai.com/v1`.

    Raises:
        ConfigError: it is no http address, holds a user name, a password or a query, or would send rows in the clear over a network.
    """
    shown, where = one_line(redact(text), limit=120), "--endpoint"
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not text.isascii() or any(char.isspace() for char in text.strip()) or port == 0:
        raise ConfigError(f"{shown!r} is no address", hint="say https://HOST/v1", where=where)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError("an address holds no user, password, query or fragment", hint="a key belongs in the environment", where=where)
    if parts.scheme == "http" and not is_loopback(text) and not plain_http:
        told = "over plain http anybody on the way reads the key and the rows"
        raise ConfigError(told, hint="say https://, or --allow-plain-http in a network of your own", where=where)
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}{'' if path.endswith(_PATH) else _PATH}"


def key_from(name: str, *, loopback: bool) -> str:
    """Return the key in the environment variable `name` (empty: the usual one, which is not sent to this machine itself).

    Raises:
        ConfigError: it is not set, or holds what no header can.
    """
    variable, where = name or USUAL_KEY, "--key-env" if name else "--endpoint"
    if not _VARIABLE.fullmatch(variable):  # perhaps the key itself, so it is not repeated
        raise ConfigError("this is no name of a variable", hint="name the variable that holds the key, not the key", where=where)
    key = os.environ.get(variable, "").strip()
    if loopback and not name:
        return ""
    if not key:
        raise ConfigError(f"{redact(variable)} is not set", hint="put the key there, or name its variable with --key-env", where=where)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"what {variable} holds is no key", where=where)
    return key


def _rest(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(_LONGEST_REPLY)
    except (OSError, http.client.HTTPException):
        return b""


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None
