"""COCO instances: counting and presence questions made from boxes.

``instances_val2017.json``::

    {"info": {...}, "licenses": [...],
     "images": [{"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640,
                 "id": 397133}, ...],
     "annotations": [{"segmentation": [[510.66, 423.01, ...]], "area": 702.1057499999998,
                      "iscrowd": 0, "image_id": 289343, "bbox": [473.07, 395.93, 38.65, 28.67],
                      "category_id": 18, "id": 1768}, ...],
     "categories": [{"supercategory": "person", "id": 1, "name": "person"}, ...]}

``count``: one question per image and category that is there, unless one of its boxes is a crowd
(``iscrowd: 1`` covers an unknown number, so there is no right answer).
``presence``: one ``yes`` per category that is there (a crowd counts as there) and as many ``no``
in the same image. The absent categories are drawn by how often they are present elsewhere, so
that a category's name alone does not give the answer away. Draws depend on the seed and the ids
only. An image without boxes gives no question: it may simply not have been annotated.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.coco_ids import Id, Ids
from mmtune.readers.fields import as_object
from mmtune.readers.source import Refused, SourceFiles
from mmtune.readers.strict_json import stream_arrays
from mmtune.records import Medium, Record, Reject

_IRREGULAR = {"person": "people", "mouse": "mice", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}


def read_coco_instances(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields the questions of each image, images in the order of the file.

    Raises:
        DataError: The file is missing, cut, or holds no annotations.
    """
    path = source.file("annotations")
    listed = {"images": Ids("image", "file_name", "images"), "categories": Ids("category", "name", "categories")}
    for key, row in stream_arrays(path, tuple(listed)):
        if key in listed:
            try:
                listed[key].add(_object(row))
            except Refused as refused:
                yield Reject(row.where, source.id, refused.reason, refused.detail)
    counts: dict[Id, Counter[Id]] = {}
    crowds: set[tuple[Id, Id]] = set()
    boxes = 0
    for key, row in stream_arrays(path, ("annotations",)):
        if key != "annotations":
            continue
        boxes += 1
        try:
            value = _object(row)
            image = listed["images"].of(value, "no_image")
            category = listed["categories"].of(value, "bad_field")
        except Refused as refused:
            yield Reject(row.where, source.id, refused.reason, refused.detail)
            continue
        counts.setdefault(image, Counter())[category] += 1
        if value.get("iscrowd", 0):
            crowds.add((image, category))
    if not boxes:
        raise DataError(f"{path} holds no annotations", "check the file", "empty_input")
    often = Counter(category for found in counts.values() for category in found)
    names = listed["categories"].names
    for image, file_name in listed["images"].names.items():
        if image in counts:
            yield from _questions(source, image, file_name, counts[image], crowds, names, often, path.name)


def _object(row: Any) -> Any:
    if isinstance(row, Reject):
        raise Refused(row.reason, row.detail)
    return as_object(row.value)


def _questions(
    source: SourceFiles,
    image: Id,
    file_name: str,
    found: Counter[Id],
    crowds: set[tuple[Id, Id]],
    names: dict[Id, str],
    often: Counter[Id],
    where: str,
) -> Iterator[Record]:
    present = sorted(found, key=str)
    asked: list[tuple[str, Id, str, str]] = []
    if source.wants("count"):
        for category in present:
            if (image, category) not in crowds:
                text = f"How many {plural(names[category])} are in the image?"
                asked.append(("count", category, text, str(found[category])))
    if source.wants("presence"):
        absent = _draw_absent(source.seed, image, found, often)
        for category, answer in [*((c, "yes") for c in present), *((c, "no") for c in absent)]:
            asked.append(("presence", category, f"Is there any {names[category]} in the image?", answer))
    for task, category, text, answer in asked:
        yield Record(
            id=f"{source.id}/{image}-{task}-{category}",
            source=source.id,
            task=task,
            split=source.split,
            text=text,
            media=(Medium("image", file_name),),
            references=(answer,),
            options=("yes", "no") if task == "presence" else (),
            metadata={"image_id": str(image), "category": names[category], "answer_type": answer_type(task)},
            where=f"{where}#{image}",
        )


def answer_type(task: str) -> str:
    """Returns VQA's name for the kind of answer."""
    return "number" if task == "count" else "yes/no"


def _draw_absent(seed: int, image: Id, found: Counter[Id], often: Counter[Id]) -> list[Id]:
    """Returns as many absent categories as there are present ones, weighted by frequency.

    Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis 2006),
    with a hash in place of a random number.
    """

    def key(category: Id) -> float:
        digest = hashlib.blake2b(f"{seed}\0{image}\0{category}".encode(), digest_size=8).digest()
        unit = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
        return -math.log(unit) / often[category]

    return sorted((category for category in often if category not in found), key=key)[: len(found)]


def plural(name: str) -> str:
    """Returns the plural of a category name."""
    first, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("fe"):
        last = last[:-2] + "ves"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{first} {last}".strip()
