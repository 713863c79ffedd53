"""What a run of ours cannot have together though another tool can: settled by a named change, so that the imported run is whole."""

from __future__ import annotations

from qlora_tui.engine.foreign.ledger import Ledger
from qlora_tui.engine.foreign.source import shown
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, from_values
from qlora_tui.engine.text import one_line
from qlora_tui.engine.values import Value


def settle(ledger: Ledger) -> None:
    """Change what does not go together, each with its reason; say it where nothing would be measured."""
    values = {name: key.default for name, key in KEYS.items()} | ledger.values
    if values["init_lora_weights"] == "pissa" and values["method"] != "lora":
        _revise(ledger, "init_lora_weights", "default", "pissa needs a base of 16 bits")
    elif values["init_lora_weights"] == "pissa" and values["use_dora"]:
        _revise(ledger, "init_lora_weights", "default", "DoRA and pissa both take the base's weights apart")
    if values["use_dora"] and values["lora_dropout"]:
        _revise(ledger, "lora_dropout", 0.0, "with DoRA there is no dropout here")
    if not values["val_set_size"] and not values["eval_data"]:
        ledger.note("No rows are held out, as in the file, so nothing can say whether it helped: --set val_set_size=0.1 does it.")
    for problem in problems(from_values(ledger.values)):
        if problem.where in KEYS and ledger.values.get(problem.where):
            _revise(ledger, problem.where, KEYS[problem.where].default, one_line(problem.message))


def _revise(ledger: Ledger, key: str, value: Value, why: str) -> None:
    was = ledger.values.get(key)
    ledger.revise(key, value, f"{why}; it was {shown(key, was)}")
