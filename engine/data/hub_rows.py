"""Rows of a dataset on the hub, through `datasets`: the only place that needs a network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from qlora_tui.engine.errors import DataError, EngineError, FetchError
from qlora_tui.engine.text import one_line

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.\[\]%-]+)?")
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".parquet", ".tsv", ".arrow", ".gz", ".zst", ".zstd")
_PATIENCE_SECONDS = 8.0


def is_hub_name(name: str) -> bool:
    """Say whether `name` reads like `owner/name`, with `:split` after it or not, and not like a file."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(_FILE_ENDINGS)


def read_hub(name: str, *, subset: str = "") -> Iterator[Mapping[str, object]]:
    """Yield the rows of a hub dataset's split; `train` unless the name ends in `:split`; `subset` is its configuration.

    The hub is asked once, briefly, before anything else: an unreachable one costs seconds, not minutes.

    Raises:
        DataError: no such dataset or split, or one that may not be read; or HF_HUB_OFFLINE is set and it is not in the cache.
        FetchError: the hub could not be reached, or went away.
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()  # they would be drawn into the screen
    repo, _, split = name.partition(":")
    _ask(repo)
    try:
        yield from load_dataset(repo, subset or None, split=split or "train")
    except EngineError:
        raise
    except (ValueError, KeyError) as error:
        raise DataError(
            f"the dataset cannot be read ({one_line(error, limit=200)})", hint="name a split: owner/name:split", where=name
        ) from None
    except Exception as error:  # noqa: BLE001  (datasets raises whatever its readers do)
        if _offline():
            told = "there is no such file, HF_HUB_OFFLINE is set, and the cache of datasets does not hold it"
            raise DataError(told, hint="unset it once, or name a file", where=name) from None
        raise FetchError(f"the dataset could not be fetched ({one_line(error, limit=200)})", where=name) from None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _ask(repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if _offline():
        return  # datasets then reads its cache alone, and says so itself
    try:
        HfApi().dataset_info(repo, timeout=_PATIENCE_SECONDS)
    except GatedRepoError:
        raise DataError("its owner has to let you in first", hint="ask on its hub page, then: hf auth login", where=repo) from None
    except RepositoryNotFoundError:
        raise DataError("there is no such file, and no such dataset on the hub", where=repo) from None
    except (HfHubHTTPError, OSError) as error:
        raise FetchError(
            f"the hub could not be reached ({one_line(error, limit=160)})", hint="name a local file, or try again", where=repo
        ) from None
    except Exception as error:  # noqa: BLE001  (httpx errors are no OSError)
        raise FetchError(
            f"the hub could not be reached ({type(error).__name__})", hint="name a local file, or try again", where=repo
        ) from None
