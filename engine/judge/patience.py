"""Asking again where an endpoint is busy: a few times, later each time, and as late as it asks for."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable

from qlora_tui.engine.errors import FetchError
from qlora_tui.engine.judge.endpoint import Busy, Endpoint, Reply
from qlora_tui.engine.judge.question import Message

TRIES = 5
LONGEST_WAIT = 120.0
"""Seconds; whoever asks for more is asked again in another session, and nothing is lost by that."""

Wait = Callable[[float], object]
"""Waits so many seconds; may raise to interrupt."""


def ask(
    endpoint: Endpoint,
    question: list[Message],
    *,
    wait: Wait,
    now: Callable[[], float] = time.time,
    lost: Callable[[], object] = lambda: None,
) -> Reply:
    """Return the reply, trying five times where the endpoint is busy, broken or silent.

    Waits are 1, 2, 4 and 8 seconds, or what `Retry-After` asks for. `lost` is called for a try that was sent and never answered:
    it may be billed all the same.

    Raises:
        Refused: another try would not help.
        FetchError: five tries did not, or the endpoint asks for a longer wait than is sensible.
    """
    for number in range(TRIES):
        try:
            return endpoint.ask(question)
        except Busy as busy:
            if busy.sent:
                lost()
            pause = max(2.0**number, _seconds(busy.after, now()))
            if number == TRIES - 1:
                raise FetchError(f"{busy.problem.message}, {TRIES} times", where=endpoint.host, hint="go on later") from None
            if pause > LONGEST_WAIT:
                raise FetchError(f"it asks to wait {pause:.0f} s", where=endpoint.host, hint="go on later") from None
            wait(pause)
    raise AssertionError("the last try returns or raises")


def _seconds(after: str, now: float) -> float:
    """Return the seconds that a `Retry-After` header asks for, in seconds or as a date; 0 where it says nothing sensible."""
    text = after.strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
