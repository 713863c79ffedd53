"""The time up to the first frame, in which Python collects no garbage.

Modules and widgets are made by the thousand and none of them goes away again, yet the collector looks through all of them
dozens of times: 35 of 380 ms. What the first frame left is there to stay, so it is never looked through later either.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """Hold the collector back; call it before the screens are imported."""
    gc.disable()


def end() -> None:
    """Let it work again, on what comes from here on; does no harm a second time."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
