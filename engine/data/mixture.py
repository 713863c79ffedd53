"""Several sources in the shares a person asked for.

A share is reached by leaving rows of the larger sources out, never by using a row twice: what is repeated is learned by
heart. Which rows stay hangs on the seed and on their texts, not on the order of a file.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.rules import weights_fault
from qlora_tui.engine.spec import RunConfig


def weights_of(run: RunConfig) -> tuple[float, ...]:
    """Return the weight of each source; none if the run names none.

    Raises:
        ConfigError: they are not as many as there are sources, or one is no positive number.
    """
    if fault := weights_fault(run):
        raise ConfigError(fault.message, hint=fault.hint, where=fault.where)
    return tuple(map(float, run.data_weights))


def quotas(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows of each source to use, so that they stand to each other as the weights do and as many are used as can be.

    One source is used whole. A source that has rows gives at least one, however small its weight.

    >>> quotas([1000, 100], [1.0, 1.0])
    [100, 100]
    """
    pairs = [(count, weight) for count, weight in zip(counts, weights, strict=True) if count]
    if not pairs:
        return [0] * len(counts)
    scale = min(count / weight for count, weight in pairs)
    return [min(count, max(1, round(weight * scale))) if count else 0 for count, weight in zip(counts, weights, strict=True)]


def draw_key(text: bytes, seed: int) -> int:
    """Return a number that stands for `text` under `seed`: the rows with the smallest numbers are drawn."""
    return int.from_bytes(blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def draw(keys: array[int], first: int, last: int, wanted: int) -> array[int]:
    """Return the places of the `wanted` smallest of `keys[first:last]`, in order."""
    import numpy

    if wanted >= last - first:
        return array("Q", range(first, last))
    ranks = numpy.argsort(numpy.frombuffer(keys, dtype=numpy.uint64)[first:last], kind="stable")[:wanted]
    return array("Q", (numpy.sort(ranks).astype(numpy.uint64) + numpy.uint64(first)).tobytes())
