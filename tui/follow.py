"""Following a journal: the end first where the file is long, the rest behind it in slices, and any part of it again for a closer look.

Opening a run of a million steps must show how it stands at once. So the last bytes are folded over what the first bytes
say of the run, while the whole file is folded from its start. Once that has caught up it is all there is: what was folded
out of order is thrown away, and the state is that of a plain fold, to the last value.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qlora_tui.engine import events as ev
from qlora_tui.engine.events import Record, decode
from qlora_tui.engine.journal import Tail, size_of
from qlora_tui.tui.history import LIMIT, Bucket, History, at_step, started_from
from qlora_tui.tui.runstate import RunState
from qlora_tui.tui.state import fold_all

LONG = 3 << 20
"""Bytes from which on the end of a file is shown first: a shorter one is folded in less than a fifth of a second."""
END = 1 << 20
_HEAD = 1 << 18
_PLACES = 4096
_CLOSE = 6 << 20
"""The most bytes read again for a closer look: some twelve thousand steps, a sixth of a second."""


class Follower:
    """One journal, read as it grows: `state` is what to show now, `behind` says that not all of it was folded yet."""

    def __init__(self, path: Path, run_id: str = "", *, long: int | None = None, end: int = END, block: int = 1 << 16) -> None:
        """Follow `path`, which need not exist yet.

        Args:
            path: an `events.jsonl`.
            run_id: the run's name until the file tells it.
            long: bytes from which on the end is read first; `LONG` if none are named.
            end: how many bytes of the end are read first.
            block: how many bytes are folded at once.
        """
        self.path = path
        self.behind = True
        self._long, self._near, self._block = LONG if long is None else long, end, block
        self._folded = RunState(run_id=run_id)
        self._tail = Tail(path)
        self._ahead: _Ahead | None = None
        self._opened = False
        self._places: list[tuple[int, int]] = []
        self._close: History | None = None
        self.state = self._folded

    @property
    def share(self) -> float:
        """Return how much of the file was folded, from 0 to 1."""
        return min(1.0, self._tail.offset / max(1, size_of(self.path))) if self.behind else 1.0

    def look(self, seconds: float = 0.1) -> None:
        """Fold what is new, for about `seconds` at most.

        Raises:
            JournalError: the file was written by a later version.
        """
        until = time.monotonic() + seconds
        if not self._opened:
            self._opened = True
            if size_of(self.path) > self._long:
                self._ahead = _Ahead(self.path, self._folded, self._near)
        if self._ahead is not None:
            self._ahead.look()
        self.behind = True
        while self._slice():
            if time.monotonic() > until:
                break
        else:
            self.behind, self._ahead = False, None
        self.state = self._folded if self._ahead is None else _over(self._folded, self._ahead.state)

    def close_look(self, left: int, right: int) -> tuple[Bucket, ...]:
        """Return the steps from `left` to `right` as fine as can be had: read again from the file where they were merged.

        Where the file holds too much between them, or was not read so far, it is what the history has.
        """
        coarse = self.state.history.buckets
        if self._folded.history.stride == 1 or self._ahead is not None:
            return coarse
        left = max(left, coarse[0].first)
        if self._close is None or not _covers(self._close, left, right, self._folded.step):
            self._close = self._read_again(left, right)
        return self._close.buckets if self._close is not None else coarse

    def _slice(self) -> bool:
        """Fold one block; return False at the end of the file."""
        began = self._tail.offset
        lines = self._tail.lines(self._block)
        records = [record for line in lines if (record := decode(line)) is not None]
        self._remember(records, began)
        self._folded = fold_all(records, self._folded)
        return bool(lines)

    def _remember(self, records: Iterable[Record], began: int) -> None:
        """Keep where in the file which steps lie, and let a closer look that reaches to the end grow with it."""
        for record in records:
            event = record.event
            if isinstance(event, ev.Stepped):
                if not self._places or began >= self._places[-1][1] + self._block // 2:
                    self._places.append((event.step, began))
                if self._close is not None and self._close.buckets and event.step == self._close.buckets[-1].last + 1:
                    self._close = _added(self._close, event, _seconds(self._folded.history.buckets, event.step))
            elif isinstance(event, (ev.Resumed, ev.RolledBack)):
                self._places = [place for place in self._places if place[0] <= event.to_step]
                self._close = None
        if len(self._places) > _PLACES:
            self._places = self._places[::2]

    def _read_again(self, left: int, right: int) -> History | None:
        before = [place for place in self._places if place[0] <= left]
        after = [offset for step, offset in self._places if step > right]
        begin, end = before[-1][1] if before else 0, after[0] if after else self._tail.offset
        if end - begin > _CLOSE:
            return None
        tail, coarse = Tail(self.path, begin), self._folded.history.buckets
        history: History | None = None
        for line in tail.lines(end - begin):
            record = decode(line) if '"stepped"' in line or '"to_step"' in line else None
            event = record.event if record is not None else None
            if isinstance(event, (ev.Resumed, ev.RolledBack)):
                history = history.cut(event.to_step) if history is not None else None
            elif isinstance(event, ev.Stepped) and event.step <= self._folded.step:
                history = _added(history or _start(coarse, event.step), event, _seconds(coarse, event.step))
        return history


class _Ahead:
    """The end of a long file, folded over what its start says of the run."""

    def __init__(self, path: Path, start: RunState, length: int) -> None:
        self.state = fold_all(_opening(path), start)
        self._tail = Tail.near_end(path, length)

    def look(self) -> None:
        self.state = fold_all(self._tail.records(), self.state)


def _opening(path: Path) -> list[Record]:
    """Return the records before the first step: what the run is, its data and its plan."""
    found = []
    for line in Tail(path).lines(_HEAD):
        record = decode(line)
        if record is not None and isinstance(record.event, ev.Stepped):
            break
        found += [record] if record is not None else []
    return found


def _over(folded: RunState, ahead: RunState) -> RunState:
    """Return the state at the end with what is known of the way there."""
    history = folded.history.joined(ahead.history)
    first = ahead.history.buckets[0].first if ahead.history.buckets else ahead.step + 1
    evals = (*[point for point in folded.evals if point[0] < first], *[point for point in ahead.evals if point[0] >= first])
    moments = (*[one for one in folded.moments if one.step < first], *[one for one in ahead.moments if one.step >= first])
    base = folded.base_loss if folded.base_loss is not None else ahead.base_loss
    return replace(ahead, history=history, evals=evals, moments=moments, base_loss=base)


def _covers(close: History, left: int, right: int, last: int) -> bool:
    """Say whether a closer look holds these steps, and is not much wider than what would be read for them."""
    buckets = close.buckets
    if not buckets or buckets[0].first > left or buckets[-1].last < min(right, last):
        return False
    return close.stride == 1 or buckets[-1].last - buckets[0].first < max(LIMIT, 3 * (right - left))


def _start(coarse: tuple[Bucket, ...], step: int) -> History:
    """Return an empty history that goes on from the bucket before `step`, so that its smoothed line does not begin anew."""
    at = at_step(coarse, step)
    whole = coarse[at] if at >= 0 and coarse[at].last < step else coarse[at - 1] if at > 0 else None
    return started_from(whole) if whole is not None else History()


def _seconds(coarse: tuple[Bucket, ...], step: int) -> float:
    """Return about how many seconds the run had worked at `step`."""
    at = at_step(coarse, step)
    if at < 0:
        return 0.0
    end = coarse[at]
    begin = coarse[at - 1] if at else None
    if begin is None or step >= end.last:
        return end.seconds
    share = (step - begin.last) / max(1, end.last - begin.last)
    return begin.seconds + share * (end.seconds - begin.seconds)


def _added(history: History, event: ev.Stepped, seconds: float) -> History:
    return history.add(event.step, event.loss, event.lr, event.grad_norm, event.tokens, seconds)
