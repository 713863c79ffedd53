"""`report.md` and `report.html`: what a run was, what it saw and what came of it, made from its journal and its folder.

Both are written from one list of sections. The page is one file without scripts, fonts or pictures from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora_tui.engine.events import Finished, Record
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.report import markdown, page
from qlora_tui.engine.report.markdown import md
from qlora_tui.engine.report.sections import all_sections, outcome
from qlora_tui.engine.report.seen import Seen, see
from qlora_tui.engine.text import redact

__all__ = ["PAGE", "REPORT", "Seen", "md", "render", "render_page", "see", "write"]

REPORT, PAGE = "report.md", "report.html"


def write(folder: Path, records: Iterable[Record], word: Finished | None = None) -> Path:
    """Write both reports into `folder` and return the Markdown's path; `word` is the last word when it is not yet in the journal."""
    seen = see(records)
    seen.finished = word or seen.finished
    path = folder / REPORT
    replace_file(path, redact(render(seen, folder)))
    replace_file(folder / PAGE, redact(render_page(seen, folder)))
    return path


def render(seen: Seen, folder: Path) -> str:
    """Return the report as Markdown."""
    return markdown.write(_title(seen, folder), outcome(seen), all_sections(seen, folder))


def render_page(seen: Seen, folder: Path) -> str:
    """Return the report as one HTML page."""
    return page.write(_title(seen, folder), outcome(seen), all_sections(seen, folder))


def _title(seen: Seen, folder: Path) -> str:
    return seen.started.run_id if seen.started else folder.name
