"""Rows of a dataset on the hub, through `datasets`: the only place that needs a network.

The fetching runs in a process of its own, so that it can be stopped while a connection hangs, and `datasets` never lies in the
memory of a run. It leaves the rows in an Arrow file, which is removed once they are read.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_tui.engine import child
from qlora_tui.engine.data.arrow_rows import read_arrow
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.data.tape import Tape
from qlora_tui.engine.errors import DataError, EngineError, FetchError, SpaceError
from qlora_tui.engine.places import place
from qlora_tui.engine.text import one_line, without_secrets

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?(:[\w.\[\]:%+-]+)?")
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".parquet", ".tsv", ".arrow", ".gz", ".zst", ".zstd")
_PATIENCE_SECONDS = 8.0
_ROWS_AT_ONCE = 1000


def is_hub_name(name: str) -> bool:
    """Say whether `name` reads like `owner/name`, with `@subset` and `:split` after it or not, and not like a file."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(_FILE_ENDINGS)


def read_hub(name: str, tape: Tape | None = None, *, subset: str = "") -> Iterator[Raw]:
    """Yield the rows of a hub dataset's split; `train` unless the name ends in `:split`, or in a part of one: `:train[:10%]`.

    `subset` is its configuration, which the name can tell as well: `owner/name@subset`.

    The hub is asked once, briefly, before anything else: an unreachable one costs seconds, not minutes. `tape` is asked meanwhile
    whether to stop.

    Raises:
        DataError: no such dataset or split, or one that may not be read; or HF_HUB_OFFLINE is set and it is not in the cache.
        FetchError: the hub could not be reached, or went away.
        SpaceError: there is no room for the rows.
    """
    tape = tape or Tape()
    folder = place("cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".hub-")
    except OSError as error:
        raise SpaceError(f"the cache cannot be written ({error.strerror})", where=one_line(folder)) from None
    with made as fetched:
        path = Path(fetched) / "rows.arrow"
        command = [sys.executable, "-P", "-m", "qlora_tui.engine.data.hub_rows", name, subset, str(path)]
        ended = child.run(command, doing=f"fetching {name}", watch=tape.look)
        child.raise_why(ended, DataError, FetchError, SpaceError)
        if ended.code:
            raise FetchError(f"fetching the dataset broke off: {ended.last_words}", hint="start again", where=name)
        yield from read_arrow(path, tape)


def _fetch(name: str, subset: str, path: str) -> int:
    """Fetch a split and write its rows to `path`; the child's side of `read_hub`."""
    whole, _, split = name.partition(":")
    repo, _, named = whole.partition("@")
    try:
        _ask(repo)
        _write(_loaded(name, repo, subset or named, split), path)
    except EngineError as error:
        return child.say_why(error)
    except OSError as error:
        return child.say_why(SpaceError(f"its rows cannot be written ({error.strerror})", hint="make room", where=one_line(path)))
    return 0


def _loaded(name: str, repo: str, subset: str, split: str) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(repo, subset or None, split=split or "train")
    except (ValueError, KeyError) as error:
        raise DataError(
            f"the dataset cannot be read ({without_secrets(error, limit=200)})", hint="name a split: owner/name:split", where=name
        ) from None
    except Exception as error:  # noqa: BLE001  (datasets raises whatever its readers do)
        if _offline():
            told = "there is no such file, HF_HUB_OFFLINE is set, and the cache of datasets does not hold it"
            raise DataError(told, hint="unset it once, or name a file", where=name) from None
        raise FetchError(f"the dataset could not be fetched ({without_secrets(error, limit=200)})", where=name) from None


def _write(rows: Any, path: str) -> None:
    from pyarrow import OSFile, ipc

    with OSFile(path, "wb") as file, ipc.new_stream(file, rows.features.arrow_schema) as stream:
        for table in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
            stream.write_table(table)


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
            f"the hub could not be reached ({without_secrets(error, limit=160)})", hint="name a local file, or try again", where=repo
        ) from None
    except Exception as error:  # noqa: BLE001  (httpx errors are no OSError)
        raise FetchError(
            f"the hub could not be reached ({type(error).__name__})", hint="name a local file, or try again", where=repo
        ) from None


if __name__ == "__main__":
    sys.exit(_fetch(*sys.argv[1:4]))
