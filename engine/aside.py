"""Work that cannot be interrupted, done in a thread beside the caller, who looks meanwhile whether to stop.

For work that ends by itself within seconds and leaves nothing half-made: a question to a hub, a check in a C library. A thread
cannot be stopped, so what may take longer belongs into `child`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

LOOK_EVERY_SECONDS = 0.1

Result = TypeVar("Result")


def aside(work: Callable[[], Result], look: Callable[[], object], *, daemon: bool = True) -> Result:
    """Return what `work` returns, calling `look` ten times a second until then.

    What `work` raises is raised here. What `look` raises goes through at once, and the work is left to end by itself; with `daemon`
    the end of the process does not wait for that, which is right for Python code and not for C code that comes back to Python.
    """
    done: Future[Result] = Future()
    look()
    Thread(target=_do, args=(work, done), name="aside", daemon=daemon).start()
    while not wait([done], LOOK_EVERY_SECONDS).done:
        look()
    return done.result()


def _do(work: Callable[[], Result], done: Future[Result]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001  (it is raised again where somebody waits for it)
        done.set_exception(error)
