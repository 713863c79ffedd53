"""What becomes of an adapter: copied, merged into its base, packed for llama.cpp or Ollama, and proved to be the same model.

To add a target: its file, and its name in `TARGETS`.
"""

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.export import adapter, as_gguf, merged, ollama
from qlora_tui.engine.export.target import Source, Target
from qlora_tui.engine.text import one_line

TARGETS: tuple[Target, ...] = (adapter.TARGET, merged.TARGET, as_gguf.TARGET, ollama.TARGET)
"""Every form of export, in an order in which a later one can use what an earlier one made."""

__all__ = ["TARGETS", "Source", "Target", "kind_of"]


def kind_of(target: Target, kind: str, where: str) -> str:
    """Return the type of weights that `target` is written with: `kind`, or its usual one where none is asked for.

    Raises:
        ConfigError: it has no such type, or no types at all.
    """
    if not kind:
        return target.kinds[0] if target.kinds else ""
    if kind not in target.kinds:
        known = f"{target.name} has {', '.join(target.kinds)}" if target.kinds else f"{target.name} keeps the types of its weights"
        raise ConfigError(f"no type {one_line(kind, limit=40)!r} of {target.name}", hint=known, where=where)
    return kind
