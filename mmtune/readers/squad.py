"""SQuAD 1.1 and 2.0: questions whose answers are words of a paragraph (also XQuAD, MLQA, DuoRC in that layout).

``xquad.en.json``::

    {"data": [{"paragraphs": [{"context": "The Panthers defense gave up just 308 points, ranking sixth ...",
                               "qas": [{"answers": [{"answer_start": 34, "text": "308"}],
                                        "id": "56beb4343aeaaa14008c925b",
                                        "question": "How many points did the Panthers defense surrender?"}, ...]}, ...],
               "title": "Super_Bowl_50"}, ...], "version": "1.1"}

A question that SQuAD 2.0 marks ``is_impossible`` has the answer ``unanswerable``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.fields import answer_text, as_list, as_object, id_field, text_field
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.readers.strict_json import stream_arrays
from mmtune.records import Record, Reject

UNANSWERABLE = "unanswerable"


def read_squad(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per question, in the order of the file; an article at a time is in memory.

    Raises:
        DataError: The file is missing or damaged, or holds no articles.
    """
    path, found = source.file("path"), 0
    for key, row in stream_arrays(path, ("data",)):
        if key != "data":
            continue
        found += 1
        if isinstance(row, Reject):
            yield row
            continue
        yield from _article(source, row)
    if not found:
        raise DataError(f"{path} holds no articles in `data`", "check the file", "empty_input")


def _article(source: SourceFiles, row: Row) -> Iterator[Record | Reject]:
    try:
        article = as_object(row.value)
        paragraphs = as_list(article.get("paragraphs"), "/paragraphs")
    except Refused as refused:
        yield Reject(row.where, f"{source.id}/{row.index}", refused.reason, refused.detail)
        return
    for at, paragraph in enumerate(paragraphs):
        pointer = f"/paragraphs/{at}"
        try:
            context = text_field(as_object(paragraph, pointer), "context", pointer)
            questions = as_list(paragraph.get("qas"), f"{pointer}/qas")
        except Refused as refused:
            yield Reject(f"{row.where}{pointer}", f"{source.id}/{row.index}", refused.reason, refused.detail)
            continue
        for number, question in enumerate(questions):
            where = f"{pointer}/qas/{number}"
            try:
                yield _record(source, row, as_object(question, where), context, where, article)
            except Refused as refused:
                yield Reject(f"{row.where}{where}", f"{source.id}/{row.index}", refused.reason, refused.detail)


def _record(
    source: SourceFiles, row: Row, value: Mapping[str, Any], context: str, pointer: str, article: Mapping[str, Any]
) -> Record:
    question = text_field(value, "question", pointer).strip()
    if not question or not context.strip():
        raise Refused("empty_question", f"{pointer}: the question or its context is empty")
    answers = [
        answer_text(text_field(as_object(one, f"{pointer}/answers/{at}"), "text", pointer), f"{pointer}/answers/{at}")
        for at, one in enumerate(as_list(value.get("answers", []), f"{pointer}/answers"))
    ]
    if value.get("is_impossible") is True or (not answers and "answers" in value and "is_impossible" in value):
        answers = [UNANSWERABLE]
    title = article.get("title")
    return Record(
        id=f"{source.id}/{id_field(value, 'id', pointer)}",
        source=source.id,
        task="question_answering",
        split=source.split,
        text=question,
        context=context,
        references=tuple(dict.fromkeys(answers)),
        metadata={"title": title} if isinstance(title, str) else {},
        where=f"{row.where}{pointer}",
    )
