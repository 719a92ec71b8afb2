"""COCO captions: images and their captions in one file.

``captions_val2017.json``::

    {"info": {"description": "COCO 2017 Dataset", ...}, "licenses": [...],
     "images": [{"license": 4, "file_name": "000000397133.jpg",
                 "coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg",
                 "height": 427, "width": 640, "id": 397133}, ...],
     "annotations": [{"image_id": 179765, "id": 38,
                      "caption": "A black Honda motorcycle parked in front of a garage."}, ...]}

One record per caption. In ``train`` a record's only reference is its own caption; in ``val``
and ``test`` there is one record per image with all its captions as references, so that a
generated caption is scored once against all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.coco_ids import Ids
from mmtune.readers.fields import as_object, id_field, text_field
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.readers.strict_json import stream_arrays
from mmtune.records import Medium, Record, Reject


def read_coco_captions(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields caption records in the order of the file.

    Raises:
        DataError: The file is missing, cut, or holds no captions.
    """
    path = source.file("annotations")
    images = Ids("image", "file_name", "images")
    grouped: dict[tuple[str, str], list[str]] = {}
    found = 0
    # Two passes: `annotations` may come before `images`, and only file names are kept.
    for key, row in stream_arrays(path, ("images",)):
        if key == "images":
            try:
                images.add(_value(row))
            except Refused as refused:
                yield Reject(row.where, f"{source.id}/image", refused.reason, refused.detail)
    for key, row in stream_arrays(path, ("annotations",)):
        if key != "annotations":
            continue
        found += 1
        try:
            record = _record(source, row, images)
        except Refused as refused:
            yield Reject(row.where, _id(source, row), refused.reason, refused.detail)
            continue
        if source.split == "train":
            yield record
        else:
            grouped.setdefault((record.metadata["image_id"], record.media[0].path), []).extend(record.references)
    if not found:
        raise DataError(f"{path} holds no annotations", "check the file", "empty_input")
    for (image_id, file_name), captions in grouped.items():
        yield _image_record(source, image_id, file_name, captions, path.name)


def _value(row: Row | Reject) -> Any:
    if isinstance(row, Reject):
        raise Refused(row.reason, row.detail)
    return as_object(row.value)


def _id(source: SourceFiles, row: Row | Reject) -> str:
    own = row.value.get("id") if isinstance(row, Row) and isinstance(row.value, dict) else None
    return f"{source.id}/{own}" if own is not None else source.id


def _record(source: SourceFiles, row: Row | Reject, images: Ids) -> Record:
    value = _value(row)
    caption = " ".join(text_field(value, "caption").split())
    if not caption:
        raise Refused("empty_answer", "/caption: the caption is empty")
    image_id = images.of(value, "no_image")
    return Record(
        id=f"{source.id}/{id_field(value, 'id')}",
        source=source.id,
        task="caption",
        split=source.split,
        media=(Medium("image", images.names[image_id]),),
        references=(caption,),
        metadata={"image_id": str(image_id)},
        where=row.where,
    )


def _image_record(source: SourceFiles, image_id: str, file_name: str, captions: list[str], name: str) -> Record:
    return Record(
        id=f"{source.id}/image-{image_id}",
        source=source.id,
        task="caption",
        split=source.split,
        media=(Medium("image", file_name),),
        references=tuple(captions),
        metadata={"image_id": image_id},
        where=f"{name}#{image_id}",
    )
