"""Many rows rendered: Python writes them out and masks them while a thread beside it encodes the next ones.

What comes out is what `Renderer.tokens` gives row by row, in the same order, refusals included. Encoding is about half of the work
and done in Rust, where Python is not held up, so two cores do it in little more than half the time. A thread and no process: nothing
is forked, whatever else runs in this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from qlora_tui.engine.data.chat import Row
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.template import Written
from qlora_tui.engine.errors import BadRow

if TYPE_CHECKING:
    from tokenizers import Encoding

ROWS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 2**18
"""About a twentieth of a second: nobody who wants to stop waits longer for what is under way."""
_PIECES_AHEAD = 2
_LOOK_EVERY_SECONDS = 0.1

Stopping = Callable[[], None]
Begun = tuple[Row, "Written | BadRow | None"]


def rendered(renderer: Renderer, rows: Iterable[Row], stopping: Stopping = lambda: None) -> Iterator[tuple[Row, TokenRow | BadRow]]:
    """Yield each row with its tokens, or with why it cannot be trained; up to two pieces of 256 rows are taken ahead.

    `stopping` is called ten times a second while a long text is encoded; what it raises goes through.
    """
    pool = ThreadPoolExecutor(1, "encode")
    waiting: deque[tuple[list[Begun], Future[Sequence[Encoding]]]] = deque()
    try:
        for piece in _pieces(renderer, rows):
            texts = [written.text for _, written in piece if isinstance(written, Written)]
            waiting.append((piece, pool.submit(renderer.tokenizer.encode_many, texts)))
            if len(waiting) > _PIECES_AHEAD:
                yield from _finished(renderer, *waiting.popleft(), stopping)
        while waiting:
            yield from _finished(renderer, *waiting.popleft(), stopping)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pieces(renderer: Renderer, rows: Iterable[Row]) -> Iterator[list[Begun]]:
    """Yield rows written out, as many at a time as are encoded in a moment."""
    piece: list[Begun] = []
    held = 0
    for row in rows:
        try:
            written: Written | BadRow | None = renderer.begin(row.chat)
        except BadRow as error:
            written = error
        piece.append((row, written))
        held += len(written.text) if isinstance(written, Written) else 0
        if len(piece) == ROWS_AT_ONCE or held > _CHARACTERS_AT_ONCE:
            yield piece
            piece, held = [], 0
    yield piece


def _finished(
    renderer: Renderer, piece: Sequence[Begun], encoding: Future[Sequence[Encoding]], stopping: Stopping
) -> Iterator[tuple[Row, TokenRow | BadRow]]:
    while not wait([encoding], _LOOK_EVERY_SECONDS).done:
        stopping()
    if encoding.exception() is not None:  # one text of them cannot be encoded: which, and why, each on its own tells
        yield from ((row, _alone(renderer, row)) for row, _ in piece)
        return
    each = iter(encoding.result())
    for row, written in piece:
        yield row, written if isinstance(written, BadRow) else _masked(renderer, row, written, None if written is None else next(each))


def _masked(renderer: Renderer, row: Row, written: Written | None, found: Encoding | None) -> TokenRow | BadRow:
    try:
        return renderer.finish(row, written, None if found is None else (found.ids, found.offsets))
    except BadRow as error:
        return error


def _alone(renderer: Renderer, row: Row) -> TokenRow | BadRow:
    try:
        return renderer.tokens(row)
    except BadRow as error:
        return error
