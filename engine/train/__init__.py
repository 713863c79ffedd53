"""Training: from a checked run to a measured adapter, as a generator of events."""

from qlora_tui.engine.train.ending import Result
from qlora_tui.engine.train.job import Job, train

__all__ = ["Job", "Result", "train"]
