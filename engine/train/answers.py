"""What base and tuned answer to held-out prompts once a run is over: the same model, its adapter off and on, greedily.

The base is loaded as it was for training, and so are the rows: a prompt is what the run would have measured, up to its first
answer. Whether it is really the same hold-out is checked against the rows that the run measured; answers to prompts that were
trained on would prove nothing.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine import builtin, checkpoint, evaluate, hub
from qlora_tui.engine.data import Dataset, Tokenizer, TokenRow, load_tokenizer, prepare
from qlora_tui.engine.errors import CheckpointError, DataError, WontFit
from qlora_tui.engine.judge import Answered, Sheet, adapter_digest, begin_answers, keep_answer, wanted_pairs
from qlora_tui.engine.load import Loaded, choose_dtype, load
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.meter import out_of_memory, said
from qlora_tui.engine.sample import greedy
from qlora_tui.engine.spec import BUILTIN, RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import BASE

Stopping = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A finished run, read again: where it lies, what it trained, and how many prompts are asked; `stopping` raises to end it."""

    run: RunConfig
    folder: Path
    files: hub.ModelFiles
    positions: int
    machine: Machine
    dataset: Dataset
    eval_dataset: Dataset | None
    rows: int
    tokens: int
    stopping: Stopping = lambda: None


@dataclass(frozen=True, slots=True)
class _Prompt:
    row: int
    text: str
    wanted: str
    ids: list[int]


def answer(asking: Asking) -> Iterator[Answered]:
    """Let base and tuned answer, keep each pair of answers at once, and yield it; what is kept already is not made again.

    Raises:
        CheckpointError: the run left no adapter, or one that does not belong to its base.
        DataError: nothing is held out, or it is not what the run held out.
        WontFit: the device ran out of memory.
    """
    adapter = asking.folder / "adapter"
    sheet = _sheet(asking, adapter)
    weights = _weights(asking)
    tokenizer = load_tokenizer(weights, asking.run.chat_template).claim()
    asked = _prompts(asking, tokenizer)
    chosen = [asked[place] for place in wanted_pairs(len(asked), asking.rows, asking.run.seed)]
    known = {found.row for found in begin_answers(asking.folder, dataclasses.replace(sheet, rows=len(chosen), held=len(asked)))}
    prompts = [prompt for prompt in chosen if prompt.row not in known]
    if not prompts:
        return
    loaded = load(dataclasses.replace(asking.run, gradient_checkpointing="false"), weights, asking.machine)
    checkpoint.read_adapter(adapter, loaded.model)
    fence = Fence(loaded)
    for prompt in prompts:
        found = _both(asking, loaded, fence, tokenizer, prompt)
        keep_answer(asking.folder, found)
        yield found


def _sheet(asking: Asking, adapter: Path) -> Sheet:
    try:
        digest = adapter_digest(adapter)
    except OSError as error:
        hint = f"qlora-tui --resume {one_line(asking.folder.name)} goes on until there is one"
        raise CheckpointError("this run left no adapter to compare with its base", where=one_line(asking.folder), hint=hint) from error
    run = asking.run
    kind = (run.method, run.bnb_4bit_quant_type) if run.method == "qlora" else (run.method,)
    base = " ".join((*kind, str(choose_dtype(run, asking.machine)).removeprefix("torch.")))
    return Sheet(digest, asking.rows, asking.tokens, run.seed, base)


def _weights(asking: Asking) -> Path:
    """Return the folder of the base, fetching what the cache has lost."""
    name = asking.run.model_name_or_path

    def stopped() -> bool:
        asking.stopping()
        return False

    if Path(name).is_dir():
        return asking.files.folder
    if name.startswith(BUILTIN):
        return builtin.fetch(lambda done, total: None, stopped)
    return hub.weights(name, asking.run.revision, asking.files.commit, lambda done, total: None, stopped)


def _prompts(asking: Asking, tokenizer: Tokenizer) -> list[_Prompt]:
    """Return what the held-out rows ask, in their order; 500 rows at most are held out, so all are looked at."""
    tokenized = prepare(asking.run, asking.dataset, tokenizer, eval_dataset=asking.eval_dataset, stopping=asking.stopping)
    rows = tokenized.holdout
    if not rows:
        raise DataError("this run held no rows out", hint="a run with val_set_size, or with eval_data, has prompts to compare answers to")
    _check_rows(asking.folder, [row.row for row in rows])
    made = {prompt.row: prompt for row in rows if (prompt := _prompt(asking, tokenizer, row)) is not None}
    return list(made.values())  # of a row that was split the last part


def _check_rows(folder: Path, rows: list[int]) -> None:
    """Compare with the rows whose loss the run measured.

    Raises:
        DataError: they are others.
    """
    path = folder / "eval" / f"{BASE}.jsonl"
    if path.exists() and [loss.row for loss in evaluate.read_rows(path)] != rows:
        told = "the held-out rows are not those of the run: its data or its tokenizer changed"
        raise DataError(told, where=one_line(folder), hint="put the old files back")


def _prompt(asking: Asking, tokenizer: Tokenizer, row: TokenRow) -> _Prompt | None:
    """Return what a row asks: up to its first answer, or the first half of a text that is all answer; None where no answer has room."""
    first = row.trained.index(1)
    begins = first if first > 1 else len(row.input_ids) // 2
    ends = next((place for place in range(begins, len(row.trained)) if not row.trained[place]), len(row.trained))
    ids = list(row.input_ids)
    if not 0 < begins < asking.positions - 1:
        return None
    stops = tokenizer.stop_ids()
    wanted = [index for index in ids[begins:ends] if index not in stops]
    return _Prompt(row.row, _question(asking, tokenizer, row.row, ids[:begins]), tokenizer.decode(wanted), ids[:begins])


def _question(asking: Asking, tokenizer: Tokenizer, number: int, ids: list[int]) -> str:
    """Return the prompt as people read it: its turns without the template's marks, where all are in it; else as the model does."""
    written = tokenizer.decode(ids)
    rows = (asking.eval_dataset or asking.dataset).rows
    place = bisect_left(rows, number, key=lambda row: row.number)
    if place == len(rows) or rows[place].number != number or rows[place].chat.verbatim or rows[place].chat.ids is not None:
        return written
    turns = rows[place].chat.turns
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    before = turns[: answers[-1 if asking.run.mask_history else 0]] if answers else ()
    if not before or not all(turn.content.strip() in written for turn in before):
        return written
    return before[0].content if len(before) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in before)


def _both(asking: Asking, loaded: Loaded, fence: Fence, tokenizer: Tokenizer, prompt: _Prompt) -> Answered:
    (base, cut_base), (tuned, cut_tuned) = (_one(asking, loaded, fence, tokenizer, prompt, off=off) for off in (True, False))
    return Answered(prompt.row, prompt.text, prompt.wanted, base, tuned, (cut_base, cut_tuned))


def _one(asking: Asking, loaded: Loaded, fence: Fence, tokenizer: Tokenizer, prompt: _Prompt, *, off: bool) -> tuple[str, bool]:
    """Return one answer, and whether it was cut off."""
    most = min(asking.tokens, asking.positions - len(prompt.ids))
    try:
        with fence.excursion(adapter_off=off):
            ids = greedy(loaded, prompt.ids, most, tokenizer.stop_ids(), asking.stopping)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        hint = "a smaller --tokens needs less; or close what else uses the device"
        raise WontFit(f"the device ran out of memory while answering ({said(error)})", hint=hint) from error.with_traceback(None)
    return tokenizer.decode(ids), len(ids) >= most
