"""Data: reading, recognising, checking, batching and packing."""

from __future__ import annotations

from espalier.data.batching import batches, in_order
from espalier.data.checking import Report, check
from espalier.data.loading import TaskData, own_split, read_rows, read_task
from espalier.data.packing import pack, packing_refusal
from espalier.tasks import Row

__all__ = [
    "Report",
    "Row",
    "TaskData",
    "batches",
    "check",
    "in_order",
    "own_split",
    "pack",
    "packing_refusal",
    "read_rows",
    "read_task",
]
