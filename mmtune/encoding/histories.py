"""What a model leaves out of the histories it is shown: old items, and those that it does not know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from mmtune.encoding.render import MediaSpan
from mmtune.records import items_of


def history_counts(processor: Any, media: Iterable[MediaSpan]) -> Counter[str]:
    """Returns, of the histories of a row, ``histories_shortened``, ``items_read`` and among these ``items_unknown``.

    Args:
        processor: Of a composite model that reads histories, if there are any.
        media: The media of the row.
    """
    found: Counter[str] = Counter()
    for items in (items_of(span.medium) for span in media if span.medium.modality == "behaviour"):
        read = processor.newest(items)
        found["histories_shortened"] += len(read) < len(items)
        found["items_read"] += len(read)
        found["items_unknown"] += sum(not processor.knows(item) for item in read)
    return found
