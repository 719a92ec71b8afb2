"""VQA v2: a questions file joined with an annotations file by ``question_id``.

Questions (``v2_OpenEnded_mscoco_train2014_questions.json``)::

    {"info": {"description": "Subset of VQA v2.0 balanced real images", ...},
     "task_type": "Open-Ended", "data_type": "mscoco", "license": {...},
     "data_subtype": "train2014",
     "questions": [{"image_id": 25, "question": "What is the giraffe standing behind?",
                    "question_id": 25006}, ...]}

Annotations (``v2_mscoco_train2014_annotations.json``)::

    {"info": {...}, "data_type": "mscoco", "data_subtype": "train2014", "license": {...},
     "annotations": [{"answer_type": "other", "multiple_choice_answer": "tree",
                      "answers": [{"answer": "tree", "answer_confidence": "yes",
                                   "answer_id": 1}, ...], "image_id": 25,
                      "question_type": "what is the", "question_id": 25006}, ...]}

All ten answers are kept as references and ``multiple_choice_answer`` is taught. The image is
``COCO_<data_subtype>_<image_id:012d>.jpg``, else ``<image_id:012d>.jpg``, ``<image_id>.jpg`` or
``<image_id>.png`` in the images folder. Without annotations (the test split) there is nothing
to teach or to score.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.fields import as_list, as_object, id_field, text_field
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.readers.strict_json import stream_arrays
from mmtune.records import Medium, Record, Reject

Item = tuple[str, Mapping[str, Any]]
"""Where it stands and what it says."""


def read_vqa_v2(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per question that has an annotation.

    Both files are read side by side; only items that wait for their partner are in memory
    (none, when the files are in the same order).

    Raises:
        DataError: A file is missing, cut or empty, or a ``question_id`` stands twice.
    """
    names = ImageNames(source.root("image"))
    questions = _items(source, source.file("questions"), "questions", names)
    if source.annotations is None:
        if source.split == "train":
            source.file("annotations")
        for item in questions:
            yield item if isinstance(item, Reject) else _guarded(source, item[1], None, names)
        return
    annotations = _items(source, source.file("annotations"), "annotations", names)
    yield from _join(source, questions, annotations, names)


def _join(
    source: SourceFiles,
    questions: Iterator[tuple[str, Item] | Reject],
    annotations: Iterator[tuple[str, Item] | Reject],
    names: ImageNames,
) -> Iterator[Record | Reject]:
    waiting: tuple[dict[str, Item], dict[str, Item]] = ({}, {})
    streams = (questions, annotations)
    ended = [False, False]
    while not all(ended):
        for side in (0, 1):
            item = next(streams[side], None)
            if item is None:
                ended[side] = True
            elif isinstance(item, Reject):
                yield item
            else:
                key, found = item
                partner = waiting[1 - side].pop(key, None)
                if partner is None:
                    if key in waiting[side]:
                        raise _twice(source, key, found[0])
                    waiting[side][key] = found
                else:
                    pair = (found, partner) if side == 0 else (partner, found)
                    yield _guarded(source, pair[0], pair[1], names)
    for key, (where, _) in waiting[0].items():
        yield Reject(where, f"{source.id}/{key}", "no_annotation", f"question {key} has no annotation")
    for key, (where, _) in waiting[1].items():
        yield Reject(where, f"{source.id}/{key}", "no_question", f"annotation {key} has no question")


def _twice(source: SourceFiles, key: str, where: str) -> DataError:
    return DataError(
        f"question_id {key} stands twice ({where}, source {source.id!r})",
        "remove one of them; build.dedup cannot know which answers belong to it",
        "duplicate_id",
    )


def _items(source: SourceFiles, path: Path, key: str, names: ImageNames) -> Iterator[tuple[str, Item] | Reject]:
    empty = True
    for name, row in stream_arrays(path, (key,)):
        if name == "data_subtype" and isinstance(row, Row):
            names.subtype = str(row.value)
        if name != key:
            continue
        empty = False
        if isinstance(row, Reject):
            yield row
            continue
        try:
            value = as_object(row.value)
            yield str(id_field(value, "question_id")), (row.where, value)
        except Refused as refused:
            yield Reject(row.where, f"{source.id}/{source.split}-{row.index}", refused.reason, refused.detail)
    if empty:
        raise DataError(f"{path} holds no {key}", "check the file", "empty_input")


def _guarded(source: SourceFiles, question: Item, annotation: Item | None, names: ImageNames) -> Record | Reject:
    where, row = question
    try:
        return _record(source, question, annotation, names)
    except Refused as refused:
        return Reject(where, f"{source.id}/{row['question_id']}", refused.reason, refused.detail)


def _record(source: SourceFiles, question: Item, annotation: Item | None, names: ImageNames) -> Record:
    where, row = question
    image_id = id_field(row, "image_id")
    text = text_field(row, "question").strip()
    if not text:
        raise Refused("empty_question", "/question: the question is empty")
    references: tuple[str, ...] = ()
    target = ""
    metadata = {"image_id": str(image_id)}
    if annotation is not None:
        said = annotation[1]
        if "image_id" in said and said["image_id"] != image_id:
            raise Refused("id_mismatch", f"question shows image {image_id}, its annotation {said['image_id']}")
        references = _answers(said.get("answers", []))
        target = text_field(said, "multiple_choice_answer") if "multiple_choice_answer" in said else ""
        target = target.strip() or next((answer.strip() for answer in references if answer.strip()), "")
        if not target:
            raise Refused("empty_answer", "/multiple_choice_answer: the answer is empty")
        references = references or (target,)
        for key in ("question_type", "answer_type"):
            if isinstance(said.get(key), str):
                metadata[key] = said[key]
    return Record(
        id=f"{source.id}/{row['question_id']}",
        source=source.id,
        task="vqa",
        split=source.split,
        text=text,
        media=(Medium("image", names.find(image_id)),),
        references=references,
        target=target,
        metadata=metadata,
        where=where,
    )


def _answers(answers: Any) -> tuple[str, ...]:
    return tuple(
        text_field(as_object(answer, f"/answers/{at}"), "answer", f"/answers/{at}")
        for at, answer in enumerate(as_list(answers, "/answers"))
        if not _is_answer(answer)
    ) or tuple([answer["answer"] for answer in answers])


def _is_answer(answer: Any) -> bool:
    return type(answer) is dict and type(answer.get("answer")) is str


class ImageNames:
    """Finds the file of an image id; the pattern that fitted last is tried first."""

    def __init__(self, root: Path, subtype: str = "") -> None:
        self._root = str(root)
        self.subtype = subtype
        self._last = 0

    def candidates(self, image_id: int | str) -> list[str]:
        """Returns the names an image may have, the official one first; as many for every id, some twice."""
        padded = f"{image_id:012d}" if isinstance(image_id, int) else image_id
        official = f"COCO_{self.subtype}_{padded}.jpg" if self.subtype else f"{padded}.jpg"
        plain = [f"{stem}.{ending}" for stem in (padded, image_id) for ending in ("jpg", "png", "jpeg")]
        return [official, official.removesuffix("jpg") + "png", *plain]

    def find(self, image_id: int | str) -> str:
        """Returns the name of the file; the official one when there is none."""
        names = self.candidates(image_id)
        for at in (self._last, *range(len(names))):
            if not _plain(names[at]):
                return names[at]
            if os.path.isfile(f"{self._root}/{names[at]}"):  # noqa: PTH113 - called for every row
                self._last = at
                return names[at]
        return names[0]


def _plain(name: str) -> bool:
    """Says whether a name can be looked up without leaving the folder."""
    return "/" not in name and "\\" not in name and "\0" not in name
