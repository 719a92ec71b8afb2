"""ChartQA questions about charts.

``test_human.json``::

    [{"imgname": "10146.png",
      "query": "What's the average of last three values in green graph (round to one decimal)?",
      "label": "28.6"},
     {"imgname": "multi_col_80918.png", "query": "...", "label": "[Yes, No]"}, ...]

The images lie in ``png/`` beside the file. A label is kept as it is written, lists too; answers
are scored by relaxed accuracy (Masry et al. 2022: numbers may be 5 % off).
"""

from __future__ import annotations

from collections.abc import Iterator

from mmtune.readers.fields import answer_text, as_object, record_id, scalar_text, text_field
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import Medium, Record, Reject


def read_chartqa(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per question."""
    path = source.file("path")
    beside = source.images is None and (path.parent / "png").is_dir()
    part = next((name for name in ("human", "augmented") if name in path.stem), "")

    def record(row: Row) -> list[Record]:
        value = as_object(row.value)
        question = text_field(value, "query").strip()
        if not question:
            raise Refused("empty_question", "/query: the question is empty")
        answer = answer_text(scalar_text(value.get("label"), "/label"), "/label")
        name = text_field(value, "imgname")
        return [
            Record(
                id=record_id(source, value.get("id"), row),
                source=source.id,
                task="chart",
                split=source.split,
                text=question,
                media=(Medium("image", f"png/{name}" if beside else name),),
                references=(answer,),
                metadata={"part": part} if part else {},
                where=row.where,
            )
        ]

    yield from read_rows(iter_items(path), record, source=source, id_column="id")
