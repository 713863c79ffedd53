"""The record of an export as people read it: on the command line, in a run's warnings and in its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_tui.engine.export.target import Json
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib


def lines(record: Json) -> list[tuple[str, str]]:
    """Return the record as pairs of a word and a sentence."""
    kind = f" ({record['type']})" if record["type"] else ""
    found = [(str(record["target"]), f"{one_line(record['path'], limit=4000)}{kind}, {gib(record['bytes'])}")]
    parity = record.get("parity")
    found += _parity(parity) if parity else [("parity", "not looked at: nobody has compared it with the adapter")]
    if parity is None or parity["passed"]:
        found.append(("use", one_line(record["use"], limit=4000)))
    return found


def sentence(record: Json) -> str:
    """Return in one sentence what became of an export."""
    parity = record.get("parity")
    if parity is None:
        return f"{record['target']} is in {record['path']}; nobody has compared it with the adapter"
    if not parity["passed"]:
        return f"{record['target']} was refused and is kept in {record['path']}: {parity['faults'][0]}"
    return f"{record['target']} is in {record['path']}, off from the adapter by {parity['difference']:.4f} nats a token"


def _parity(parity: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "parity",
        f"{'passed' if parity['passed'] else 'REFUSED'}: {parity['rows']} {parity['data']} by {one_line(parity['engine'])}, "
        f"off by {parity['difference']:.5f} nats a token on average, at most {parity['worst']:.5f} (row {parity['worst_row']}); "
        f"limit {parity['limit']:g}",
    )
    quantized = parity["quantized_loss"]
    yield (
        "losses",
        f"export {parity['loss']:.4f}, adapter on the 16-bit base {parity['adapter_loss']:.4f}, that base alone {parity['base_loss']:.4f}; "
        + (
            f"adapter on the base as trained {quantized:.4f}"
            if quantized is not None
            else "on the base as trained: not measured by the run"
        ),
    )
    if parity["prompts"]:
        differ = parity["prompt_tokens_differing"]
        stop = f"; answers end with {one_line(parity['stop'], limit=40)}" if parity["stop"] else ""
        yield "prompts", f"{parity['prompts']} compared, {f'{differ} tokens differ' if differ else 'alike to the token'}{stop}"
    yield from (("fault", one_line(fault)) for fault in parity["faults"])
    yield from (("note", one_line(note)) for note in parity["notes"])
