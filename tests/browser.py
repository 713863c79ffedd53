"""A headless Chromium, driven over its DevTools socket: what a page asks for, what it is told, keys and pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PATIENCE = 60.0
_KEYS = {"Enter": (13, "\r"), "Tab": (9, "\t"), "Escape": (27, "")}


class Page:
    """One page: `addresses` are all that it asked for, `drawn` is what its websocket was sent."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._next = socket, 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.addresses: list[str] = []
        self.complaints: list[str] = []
        self.drawn = b""
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> Any:
        self._next += 1
        number = self._next
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self._answers[number], PATIENCE)

    async def open(self, address: str) -> None:
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=address)

    async def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, (self.drawn[-1500:], self.complaints)
            await asyncio.sleep(0.02)

    async def press(self, key: str) -> None:
        """Press a named key or type one character, as a keyboard does."""
        code, text = _KEYS.get(key, (ord(key.upper()[0]), key))
        about = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    async def evaluate(self, script: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=script, awaitPromise=True))["result"].get("value")

    async def picture(self) -> bytes:
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said.get("result", said.get("error")))
            else:
                self._note(said["method"], said["params"])

    def _note(self, method: str, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.addresses.append(params["url"])
        elif method == "Network.webSocketFrameReceived" and params["response"]["opcode"] == 2:
            self.drawn += base64.b64decode(params["response"]["payloadData"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))


@contextlib.asynccontextmanager
async def browser(folder: Path, size: tuple[int, int] = (1000, 600)) -> AsyncIterator[Callable[[], Any]]:
    """Start Chromium with a profile of its own and no way to any other machine; gives a function that opens a new page."""
    assert CHROMIUM is not None
    flags = [f"--user-data-dir={folder}", "--remote-debugging-port=0", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += [f"--window-size={size[0]},{size[1]}", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--no-proxy-server"]
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told, pages = folder / "DevToolsActivePort", []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (told.exists() and told.read_text().count("\n")):
            assert time.monotonic() < deadline, "Chromium did not start"
            assert process.poll() is None, "Chromium ended"
            await asyncio.sleep(0.05)
        base = f"http://127.0.0.1:{told.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:

            async def page() -> Page:
                async with session.put(f"{base}/json/new?about:blank") as answer:
                    target = await answer.json()
                made = Page(await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0))
                pages.append(made)
                return made

            yield page
            for made in pages:
                await made.close()
    finally:
        process.terminate()
        process.wait(PATIENCE)
