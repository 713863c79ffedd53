"""Datasets: what a row holds, how it is read, rendered, masked, measured and held out. Nothing here imports torch."""

from qlora_tui.engine.data.boilerplate import boilerplate
from qlora_tui.engine.data.chat import Chat, Format, Refusal, Row, Turn
from qlora_tui.engine.data.facts import count_copies, count_leaks, describe
from qlora_tui.engine.data.formats import FORMATS, detect
from qlora_tui.engine.data.holdout import HOLDOUT_CAP, size_of
from qlora_tui.engine.data.load import Dataset, Source, load, load_eval
from qlora_tui.engine.data.prepare import PreparedFacts, Tokenized, prepare
from qlora_tui.engine.data.preview import Piece, pieces
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.sources import absolute, train_alone
from qlora_tui.engine.data.store import TokenRows, lengths_of, numbers_of
from qlora_tui.engine.data.survey import Survey, histogram
from qlora_tui.engine.data.tape import Progress, Stopping
from qlora_tui.engine.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "FORMATS",
    "HOLDOUT_CAP",
    "Chat",
    "Dataset",
    "Format",
    "Piece",
    "PreparedFacts",
    "Progress",
    "Refusal",
    "Renderer",
    "Row",
    "Source",
    "Stopping",
    "Survey",
    "TokenRow",
    "TokenRows",
    "Tokenized",
    "Tokenizer",
    "Turn",
    "absolute",
    "boilerplate",
    "count_copies",
    "count_leaks",
    "describe",
    "detect",
    "histogram",
    "lengths_of",
    "load",
    "load_eval",
    "load_tokenizer",
    "numbers_of",
    "pieces",
    "prepare",
    "size_of",
    "train_alone",
]
