"""The server behind `qlora-tui serve`: nothing answers without the token, and nothing but this machine may ask.

The browser's half is textual-serve's: xterm.js in one script, its styles and a font. The page around it is ours,
since theirs asks Google for the font, and a machine with GPUs may have no way out.
"""

from __future__ import annotations

import asyncio
import html
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from qlora_tui.engine.errors import ConfigError
from qlora_tui.tui.web.tabs import Tab

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TABS = 8
"""Tabs at once: each is a process of about 100 MB."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self'; img-src 'self' data:; "
        "connect-src 'self' {socket}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "qlora-tui",
}
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Words = Callable[[bool], Sequence[str]]


class Site:
    """The pages, the websocket behind them, and the processes behind that."""

    def __init__(self, words: Words) -> None:
        """Serve tabs that run `qlora-tui` with what `words` returns when a tab opens; it is told whether a new run is wanted."""
        self.token = secrets.token_urlsafe(32)
        self.tabs: dict[Tab, asyncio.Task[Any] | None] = {}
        self.ended: list[Tab] = []
        self._words = words

    def app(self) -> web.Application:
        """Return the application; every path begins with the token."""
        app = web.Application(middlewares=[self._guard])
        root = f"/{self.token}"
        static = resources.files("textual_serve") / "static"
        app.add_routes([web.get(path, self._page) for path in (root, f"{root}/", f"{root}/new")])
        app.add_routes([web.get(f"{root}/ws", self._socket), web.get(f"{root}/new/ws", self._socket)])
        app.add_routes([web.get(f"{root}/{name}", self._file) for name in _FILES])
        app.add_routes([web.static(f"{root}/static", Path(str(static)))])
        app.on_response_prepare.append(_add_headers)
        return app

    def url(self, host: str, port: int) -> str:
        """Return the address to open."""
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/{self.token}/"

    async def hang_up(self) -> None:
        """Take every tab's terminal away; what runs behind one goes on."""
        tasks = [task for task in self.tabs.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer nobody who does not know the token or asks under a name that is not this machine's; one answer for all faults.

        A page on another site can have its own name point here (DNS rebinding): then Host is that name.
        """
        said = request.path.split("/")[1].encode("utf-8", "replace")
        known = secrets.compare_digest(said, self.token.encode())
        if not (known and _name_of(request.host) in LOOPBACK):
            raise web.HTTPNotFound(text="not found")
        return await handler(request)

    async def _page(self, request: web.Request) -> web.Response:
        new = request.path.endswith("/new")
        page = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        root = f"/{self.token}"
        address = f"ws://{request.host}{root}{'/new' if new else ''}/ws"
        return web.Response(text=page.format(root=html.escape(root), socket=html.escape(address)), content_type="text/html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.path.rsplit("/", 1)[1]
        return web.Response(body=(resources.files(__package__) / name).read_bytes(), content_type=_FILES[name])

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        """Open a tab: browsers say where a page came from, and only our own page may do this."""
        if request.headers.get("Origin") != f"http://{request.host}":
            raise web.HTTPNotFound(text="not found")
        self.ended = [tab for tab in self.ended if tab.process.poll() is None]  # no zombies of runs that went on and ended
        if len(self.tabs) >= TABS:
            raise web.HTTPServiceUnavailable(text=f"{TABS} tabs are open already")
        answer = web.WebSocketResponse(heartbeat=15, timeout=1.0, max_msg_size=1 << 20, compress=False)
        await answer.prepare(request)
        words = self._words("/new/" in request.path)
        tab = Tab(words, _number(request.query.get("width"), 80), _number(request.query.get("height"), 24))
        self.tabs[tab] = asyncio.current_task()
        try:
            await tab.serve(answer)
        finally:
            del self.tabs[tab]
            self.ended.append(tab)
        return answer


async def serve(site: Site, host: str, port: int, said: Callable[[str, int], object]) -> None:
    """Serve until SIGINT or SIGTERM; `said` is told the address and the port once it answers.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    listener = _listen(host, port)
    runner = web.AppRunner(site.app(), access_log=None, handle_signals=False, shutdown_timeout=2.0)  # a log of paths would hold the token
    await runner.setup()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        await web.SockSite(runner, listener).start()
        said(host, listener.getsockname()[1])
        await ended.wait()
    finally:
        await site.hang_up()
        await runner.cleanup()


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"port {port} cannot be used: {error.strerror}", hint="name another, or 0 for any", where="--port") from None
    return listener


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    named = {name: value.format(socket=f"ws://{request.host}") for name, value in _HEADERS.items()}
    response.headers.update(named)


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 5 else otherwise


def run(site: Site, host: str, port: int, said: Callable[[str, int], Any]) -> None:
    """Serve in this thread until it is ended."""
    asyncio.run(serve(site, host, port, said))
