r"""T0 training rows as Self-Instruct publishes them: prompts that PromptSource rendered, a file per template.

``rotten_tomatoes_Reviewer_Enjoyment.jsonl``::

    {"prompt": "effective but too-tepid biopic How does the reviewer feel about the movie?\n",
     "completion": "They loved it<|endoftext|>"}

``path`` is one file or a folder of them. The prompts are kept as they are: no other wording is put around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmtune.errors import DataError
from mmtune.readers.fields import answer_text, as_object, text_field
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.readers.strict_json import iter_jsonl
from mmtune.records import Message, Record, Reject, TextPart

_END = "<|endoftext|>"


def read_t0(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one conversation of two turns per row, file by file in the order of their names.

    Raises:
        DataError: There is no row.
    """
    path, found = source.file("path"), False
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for row in iter_jsonl(file):
            found = True
            if isinstance(row, Reject):
                yield row
                continue
            try:
                yield _record(source, row, file)
            except Refused as refused:
                yield Reject(row.where, f"{source.id}/{file.stem}-{row.index}", refused.reason, refused.detail)
    if not found:
        raise DataError(f"{path} holds no rows", "check the path; an empty source is never skipped", "empty_input")


def _record(source: SourceFiles, row: Row, file: Path) -> Record:
    value = as_object(row.value)
    asked = text_field(value, "prompt").strip()
    if not asked:
        raise Refused("empty_question", "/prompt: the prompt is empty")
    answer = answer_text(text_field(value, "completion").removesuffix(_END), "/completion")
    return Record(
        id=f"{source.id}/{file.stem}-{row.index}",
        source=source.id,
        task="conversation",
        split=source.split,
        messages=(Message("user", (TextPart(asked),)), Message("assistant", (TextPart(answer),))),
        metadata={"template": file.stem},
        where=row.where,
    )
