"""An OpenAI-compatible server on loopback that judges as it is told, misbehaves as it is told, and remembers what it was sent."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/v1/chat/completions"
_PART = re.compile(r"\[(?:answer )?(prompt|A|B) (\w+)\]\n(.*?)\n\[end \2\]", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """One request: its path, headers in lower case, and body."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> dict[str, str]:
        """Return prompt, A and B as the judge reads them."""
        return {name: text for name, _, text in _PART.findall(self.body["messages"][-1]["content"])}


@dataclass
class Misbehave:
    """What to do instead of judging: a status with a body, nothing for ever (`hang`), or a line that breaks off (`drop`)."""

    status: int = 200
    body: bytes | dict[str, Any] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    how: str = ""


def reply(text: str | None, usage: dict[str, Any] | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105} if usage is None else usage
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
        "usage": usage,
    }


def longer(parts: Mapping[str, str]) -> str:
    """Prefer the longer answer, wherever it stands."""
    a, b = (len(parts.get(name, "")) for name in "AB")
    return "VERDICT: TIE" if a == b else f"VERDICT: {'A' if a > b else 'B'}"


class FakeJudge:
    """The server, as a context manager; `script` is used up first, then `verdict` decides."""

    def __init__(self, verdict: Callable[[Mapping[str, str]], str] = longer) -> None:
        self.verdict = verdict
        self.script: list[Misbehave] = []
        self.asked: list[Asked] = []
        self.over = threading.Event()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                judge.asked.append(asked)
                act = judge.script.pop(0) if judge.script else None
                if act is None:
                    self.answer(200, reply(judge.verdict(asked.parts)), {})
                elif act.how == "hang":
                    judge.over.wait()
                    self.close_connection = True
                elif act.how == "drop":
                    self.close_connection = True
                else:
                    self.answer(act.status, act.body, act.headers)

            def do_GET(self) -> None:
                judge.asked.append(Asked(self.path, dict(self.headers), {}))
                self.answer(404, b"", {})

            def answer(self, status: int, body: bytes | dict[str, Any], headers: Mapping[str, str]) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeJudge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
