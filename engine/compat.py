"""What has to be written in two ways while two versions of a library are allowed: the one place where such things stand.

Each has the versions it is for. When the older one goes, `pyproject.toml` says so with its bound, and the line here goes too.
"""

from __future__ import annotations

CACHES = ("cache", "past_key_values")
"""What a layer calls the keys and values of earlier tokens; transformers: `past_key_values` before 5.24, gone with 5.40."""

TOWER_LAYERS = ("num_hidden_layers", "depth")
"""What a vision tower's config calls its number of layers: by family, in every transformers 5."""
