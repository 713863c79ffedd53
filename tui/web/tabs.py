"""One browser tab: a process on a pseudo-terminal, its bytes carried to and from a websocket.

textual-serve's own way (a shell command, packets on stdout, an order to quit when the tab closes) would end a run with
its tab and needs descriptor 1, which the screens send to a log. On a terminal everything holds that holds in a shell:
the tab's end is a hang-up, after which a run goes on without a screen.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from aiohttp import WSMsgType, web

COMMAND = (sys.executable, "-P", "-m", "qlora_tui.tui.web.tab")
_BLOCK = 1 << 16
_SIZES = range(2, 1001)  # columns and rows that a browser may ask for
_NOT_OURS = ("TMUX", "TMUX_PANE", "STY", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "COLUMNS", "LINES")  # of the server's terminal
_TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONUTF8": "1", "TERM_PROGRAM": "qlora-tui"}


class Tab:
    """A command on a terminal that a browser draws; the process outlives the tab if it wants to."""

    def __init__(self, words: Sequence[str], width: int, height: int) -> None:
        """Start `qlora-tui` with `words` as its options."""
        self._master, slave = os.openpty()
        self.resize(width, height)
        os.set_blocking(self._master, False)
        command, clean = [*COMMAND, *words], environment(os.environ)
        try:
            self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=clean, start_new_session=True)
        finally:
            os.close(slave)

    async def serve(self, socket: web.WebSocketResponse) -> None:
        """Carry bytes both ways until the process ends or the tab closes; then take the terminal away."""
        ways = [asyncio.create_task(self._show(socket)), asyncio.create_task(self._listen(socket))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self.close()
            await socket.close()

    def close(self) -> None:
        """Hang up."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def resize(self, width: int, height: int) -> None:
        """Give the terminal a size, if it is one."""
        if width in _SIZES and height in _SIZES:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    async def _show(self, socket: web.WebSocketResponse) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):  # the tab went away in the middle
            async for data in self._drawn():
                await socket.send_bytes(data)

    async def _drawn(self) -> AsyncIterator[bytes]:
        """Give what the process draws; a browser that takes nothing stops the reading, as a slow terminal does."""
        loop = asyncio.get_running_loop()
        while True:
            await _ready(self._master, loop.add_reader, loop.remove_reader)
            try:
                data = os.read(self._master, _BLOCK)
            except OSError:  # EIO: nobody holds the other end any more
                return
            yield data

    async def _listen(self, socket: web.WebSocketResponse) -> None:
        """Obey the page: `["stdin", text]`, `["resize", {"width": w, "height": h}]`, `["ping", text]`; anything else is ignored."""
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await self._obey(socket, message.data)

    async def _obey(self, socket: web.WebSocketResponse, text: str) -> None:
        match _decoded(text):
            case ["stdin", str(keys)]:
                await self._type(keys.encode("utf-8", "ignore"))
            case ["resize", {"width": int(width), "height": int(height)}]:
                self.resize(width, height)
            case ["ping", str(told)]:
                await socket.send_json(["pong", told])
            case _:
                return

    async def _type(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            try:
                data = data[os.write(self._master, data) :]
            except BlockingIOError:
                await _ready(self._master, loop.add_writer, loop.remove_writer)
            except OSError:  # the process has ended
                return


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a tab's process: a browser's terminal, whatever terminal the server itself is on."""
    kept = {name: value for name, value in outer.items() if name not in _NOT_OURS}
    return kept | _TERMINAL


async def _ready(handle: int, add: Callable[..., object], remove: Callable[[int], object]) -> None:
    """Wait until `handle` can be read or written."""
    told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ready() -> None:
        if not told.done():
            told.set_result(None)

    add(handle, ready)
    try:
        await told
    finally:
        remove(handle)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
