"""Data: reading, recognising, checking, batching and packing."""

from __future__ import annotations

from espalier.data.batching import batches, in_order
from espalier.data.loading import TaskData, read_rows, read_task
from espalier.tasks import Row

__all__ = [
    "Row",
    "TaskData",
    "batches",
    "in_order",
    "read_rows",
    "read_task",
]
