"""What becomes of an adapter: copied, merged into its base, packed for llama.cpp or Ollama, and proved to be the same model.

To add a target: its file, and its name in `TARGETS`.
"""

from qlora_tui.engine.export import adapter, as_gguf, merged, ollama
from qlora_tui.engine.export.target import Source, Target

TARGETS: tuple[Target, ...] = (adapter.TARGET, merged.TARGET, as_gguf.TARGET, ollama.TARGET)
"""Every form of export, in an order in which a later one can use what an earlier one made."""

__all__ = ["TARGETS", "Source", "Target"]
