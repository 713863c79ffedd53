"""What is kept of answers and judgements: two private files in the run folder, one line a fact, never rewritten.

`answers.jsonl` holds a first line about how the answers were made and then one line a prompt with both answers.
`judgements.jsonl` holds what was said of them. A judgement names the pair by a digest of its texts: whoever makes new answers
does not inherit what was said of the old ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qlora_tui.engine.errors import JournalError

ANSWERS = "answers.jsonl"
JUDGEMENTS = "judgements.jsonl"
ME = "me"
"""Who judges with two keys."""
USUAL_ROWS = 50
ANSWER_TOKENS = 256
"""Where an answer is cut off unless it ends by itself: longer than a sample, since it is to be judged as a whole."""
_VERSION = 1

Said = Literal["tuned", "base", "tie", "skip", "unclear", "taken back"]
"""`skip`: not judged, or not blind; `unclear`: a reply that holds no verdict; `taken back`: as if it had never been said."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out prompt with what both models answered; `wanted` is the answer that the row itself holds.

    `cut` says for base and tuned whether the answer was cut off because it did not end by itself.
    """

    row: int
    prompt: str
    wanted: str
    base: str
    tuned: str
    cut: tuple[bool, bool] = (False, False)

    @property
    def pair(self) -> str:
        """Return the digest that a judgement names it by."""
        text = json.dumps([self.prompt, self.base, self.tuned], ensure_ascii=True)
        return blake2b(text.encode(), digest_size=12).hexdigest()

    @property
    def same(self) -> bool:
        """Say whether there is nothing to choose: both answered the same."""
        return self.base.strip() == self.tuned.strip()

    def tuned_first(self, seed: int) -> bool:
        """Say whether the tuned answer stands first, on the left: by chance, and the same again after a restart."""
        return random.Random(f"{seed} {self.pair}").random() < 0.5


@dataclass(frozen=True, slots=True)
class Sheet:
    """How the answers were made; answers of another sheet are of no use beside these.

    `adapter` is a digest of its weights, `rows` how many are wanted, of `held` that there are; `base` is how the base was loaded.
    """

    adapter: str
    rows: int
    tokens: int
    seed: int
    base: str = ""
    held: int = 0

    def continues(self, other: Sheet) -> bool:
        """Say whether answers of `other` are part of this: made the same way, however many."""
        return (self.adapter, self.tokens, self.seed, self.base) == (other.adapter, other.tokens, other.seed, other.base)


@dataclass(frozen=True, slots=True)
class Call:
    """One question to an endpoint that was answered; `first` is who stood first, `said` what the reply preferred."""

    first: Literal["base", "tuned"]
    said: Said
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """What `by` said of a pair: itself (a person), or through one of two calls (an endpoint)."""

    pair: str
    row: int
    by: str
    said: Said
    call: Call | None = None
    t: float = 0.0


@dataclass(slots=True)
class Pairs:
    """The answers of a run and all that was said of them; `sheet` is None before any were made."""

    sheet: Sheet | None = None
    answers: list[Answered] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)

    def mine(self) -> dict[str, Said]:
        """Return the last word of the person, by pair; what was taken back is left out."""
        last = {found.pair: found.said for found in self.judgements if found.by == ME}
        return {pair: said for pair, said in last.items() if said != "taken back"}

    def judges(self) -> list[str]:
        """Return who has said something, the person first."""
        return sorted({found.by for found in self.judgements}, key=lambda name: (name != ME, name))

    def calls(self, judge: str, pair: str) -> dict[str, Call]:
        """Return what an endpoint said of a pair, by who stood first."""
        return {found.call.first: found.call for found in self.judgements if found.call and (found.by, found.pair) == (judge, pair)}

    def verdicts(self, judge: str) -> dict[str, Said]:
        """Return what `judge` thinks of each pair that it is done with.

        An endpoint is done once it was asked both ways round. Disagreement with itself is a tie: it saw no difference that
        outweighs the place. A reply without a verdict makes the pair `unclear`.
        """
        if judge == ME:
            return self.mine()
        found: dict[str, dict[str, Call]] = {}
        for item in self.judgements:
            if item.by == judge and item.call:
                found.setdefault(item.pair, {})[item.call.first] = item.call
        return {pair: _together([call.said for call in calls.values()]) for pair, calls in found.items() if len(calls) == 2}

    def dollars(self, judge: str) -> float:
        """Return what `judge` has cost, in dollars, for all that was ever asked, also of answers that are gone."""
        return sum(found.call.dollars for found in self.judgements if found.call and found.by == judge)


def _together(said: Sequence[Said]) -> Said:
    if "unclear" in said:
        return "unclear"
    return said[0] if len(set(said)) == 1 else "tie"


def wanted_pairs(places: int, rows: int, seed: int) -> list[int]:
    """Return which of `places` held-out rows are asked, in that order; a larger `rows` goes on where a smaller one ended."""
    order = list(range(places))
    random.Random(f"side by side {seed}").shuffle(order)
    return order[:rows]


def read_pairs(folder: Path) -> Pairs:
    """Return what is kept in a run folder, of the answers as many as were last asked for.

    A line that a crash left torn, or that says nothing known, is passed over.
    """
    pairs = Pairs()
    for line in _lines(folder / ANSWERS):
        if "sheet" in line:
            pairs.sheet = _sheet(line["sheet"]) or pairs.sheet
    pairs.answers = _all_answers(folder)[: pairs.sheet.rows if pairs.sheet else None]
    pairs.judgements = [found for line in _lines(folder / JUDGEMENTS) if (found := _judgement(line)) is not None]
    return pairs


def _all_answers(folder: Path) -> list[Answered]:
    """Return every answer that is kept, each row once."""
    found = {answer.row: answer for line in _lines(folder / ANSWERS) if (answer := _answered(line)) is not None}
    return list(found.values())


def adapter_digest(adapter: Path) -> str:
    """Return what names the weights of an adapter.

    Raises:
        OSError: there are none.
    """
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def are_there(folder: Path, rows: int, tokens: int) -> bool:
    """Say whether all answers that are asked for are kept already, and of the adapter that lies there."""
    pairs = read_pairs(folder)
    sheet = pairs.sheet
    if sheet is None or sheet.tokens != tokens or not len(pairs.answers) == sheet.rows == min(rows, sheet.held):
        return False
    try:
        return adapter_digest(folder / "adapter") == sheet.adapter
    except OSError:
        return False


def begin_answers(folder: Path, sheet: Sheet) -> list[Answered]:
    """Return the answers of `sheet` that are there already; those of another one are set aside, and the file begins anew.

    Raises:
        JournalError: the file is a link or cannot be written.
    """
    pairs = read_pairs(folder)
    if pairs.sheet is not None and sheet.continues(pairs.sheet):
        if sheet.rows != pairs.sheet.rows:
            keep_line(folder / ANSWERS, {"v": _VERSION, "sheet": asdict(sheet)})
        return _all_answers(folder)
    path = folder / ANSWERS
    if pairs.sheet is not None or pairs.answers:
        number = next(number for number in range(1, 1 << 30) if not (folder / f"answers-{number}.jsonl").exists())
        path.rename(folder / f"answers-{number}.jsonl")
    keep_line(path, {"v": _VERSION, "sheet": asdict(sheet)})
    return []


def keep_answer(folder: Path, answer: Answered) -> None:
    """Add one answered prompt.

    Raises:
        JournalError: the file is a link or cannot be written.
    """
    keep_line(folder / ANSWERS, {"v": _VERSION, **asdict(answer)})


def keep_judgement(folder: Path, found: Judgement) -> None:
    """Add one judgement; it is on the disk when this returns, since it may have cost money.

    Raises:
        JournalError: the file is a link or cannot be written.
    """
    call = {"call": asdict(found.call)} if found.call else {}
    line = {"v": _VERSION, "t": found.t or round(time.time(), 3), "pair": found.pair, "row": found.row, "by": found.by, "said": found.said}
    keep_line(folder / JUDGEMENTS, line | call)


def keep_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line to a private file, on the disk when this returns; what a crash left torn is cut off first.

    Raises:
        JournalError: the file is a link or cannot be written.
    """
    line = json.dumps(value, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "r+b") as file:
            file.seek(_whole(file.read()))
            file.truncate()
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise JournalError(f"{path.name} cannot be written: {error.strerror}", where=str(path.parent), hint="make room") from error


def _whole(content: bytes) -> int:
    """Return where the last whole line ends."""
    return content.rfind(b"\n") + 1


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Keep others from writing the file called `name` meanwhile: two judges at once would pay for the same pairs.

    Raises:
        JournalError: somebody does already, or the file cannot be opened.
    """
    try:
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise JournalError(f"{name} cannot be written: {error.strerror}", where=str(folder)) from error
    with os.fdopen(handle):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"another process is writing {name}", where=str(folder), hint="let it end first") from error
        yield


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content[: _whole(content)].splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and value.get("v") == _VERSION:
                yield value


def _sheet(value: Any) -> Sheet | None:
    try:
        rows, tokens, seed, held = (int(value[name]) for name in ("rows", "tokens", "seed", "held"))
        return Sheet(str(value["adapter"]), rows, tokens, seed, str(value["base"]), held)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _answered(line: Mapping[str, Any]) -> Answered | None:
    try:
        texts = {name: line[name] for name in ("prompt", "wanted", "base", "tuned")}
        cut = line.get("cut") or (False, False)
        return Answered(row=int(line["row"]), **texts, cut=(bool(cut[0]), bool(cut[1]))) if _all_text(texts.values()) else None
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _judgement(line: Mapping[str, Any]) -> Judgement | None:
    try:
        call = _call(line["call"]) if line.get("call") else None
        said = _said(line["said"])
        return Judgement(str(line["pair"]), int(line["row"]), str(line["by"]), said, call, float(line.get("t", 0.0)))
    except (KeyError, TypeError, ValueError):
        return None


def _call(value: Mapping[str, Any]) -> Call:
    return Call(
        "tuned" if value["first"] == "tuned" else "base",
        _said(value["said"]),
        int(value["tokens_in"]),
        int(value["tokens_out"]),
        float(value["dollars"]),
    )


def _said(value: object) -> Said:
    if value not in get_args(Said):
        raise ValueError("not a verdict")
    return cast("Said", value)
