"""Flickr30K captions, in the four layouts in which they are passed around.

``results_20130124.token``::

    1016887272.jpg#0	Several climbers in a row are climbing the rock while the man in red ...

``results.csv`` (a bar between fields), or ``captions.txt`` of Flickr8k (a comma)::

    image_name| comment_number| comment
    1000092795.jpg| 0| Two young guys with shaggy hair look at their hands .

``dataset_flickr30k.json`` of Karpathy's splits (only the images of the source's split are read)::

    {"images": [{"sentids": [0, 1, 2, 3, 4], "imgid": 0, "sentences": [{"tokens": ["two", ...],
      "raw": "Two young guys with shaggy hair look at their hands while ...", "imgid": 0,
      "sentid": 0}, ...], "split": "train", "filename": "1000092795.jpg"}, ...],
     "dataset": "flickr30k"}

An object of image names, each with its captions and perhaps its path::

    {"1016887272.jpg": ["Several climbers in a row are climbing the rock ...", ...,
                        "flickr30k-images/1016887272.jpg"], ...}

In ``train`` there is one record per caption, in ``val`` and ``test`` one per image with all its
captions as references.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.fields import as_list, as_object, as_text, text_field
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.readers.strict_json import iter_lines, stream_arrays
from mmtune.records import Medium, Record, Reject

Caption = tuple[str, str, str, str]
"""Image path, number of the caption, caption, where it stands."""
_IMAGE_ENDS = (".jpg", ".jpeg", ".png")
_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def read_flickr30k(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields caption records in the order of the file.

    Raises:
        DataError: The file is missing or cut, or holds no captions.
    """
    path = source.file("path")
    name = path.name.removesuffix(".gz")
    captions = _json(source, path) if name.endswith(".json") else _lines(source, path)
    empty, images = True, dict[str, Record]()
    for item in captions:
        empty = False
        if isinstance(item, Reject):
            yield item
            continue
        record = _record(source, *item)
        if isinstance(record, Reject) or source.split == "train":
            yield record
        elif (known := images.get(item[0])) is not None:
            images[item[0]] = replace(known, references=(*known.references, *record.references))
        else:
            images[item[0]] = replace(record, id=record.id.rpartition("#")[0])
    if empty:
        raise DataError(f"{path} holds no captions of the split {source.split!r}", "check the file", "empty_input")
    yield from images.values()


def _record(source: SourceFiles, image: str, number: str, caption: str, where: str) -> Record | Reject:
    words = " ".join(caption.split())
    own = f"{source.id}/{image.rpartition('/')[2]}#{number}"
    if not words:
        return Reject(where, own, "empty_answer", "the caption is empty")
    return Record(
        id=own,
        source=source.id,
        task="caption",
        split=source.split,
        media=(Medium("image", image),),
        references=(words,),
        metadata={"image_id": image.rpartition("/")[2]},
        where=where,
    )


def _lines(source: SourceFiles, path: Path) -> Iterator[Caption | Reject]:
    token = path.name.removesuffix(".gz").endswith(".token")
    separator = ""
    for number, line in iter_lines(path):
        where = f"{path.name}:{number}"
        if isinstance(line, Reject):
            yield line
        elif token:
            name, tab, caption = line.partition("\t")
            image, mark, which = name.rpartition("#")
            bad = Reject(where, "", "bad_row", "expected <image>#<number><TAB><caption>")
            yield (image, which, caption, where) if tab and mark else bad
        elif not separator:
            separator = "|" if "|" in line else ","
        else:
            yield _csv_row(line, separator, number, where)


def _csv_row(line: str, separator: str, number: int, where: str) -> Caption | Reject:
    if separator == "|":
        fields = [field.strip() for field in line.split("|", 2)]
    else:
        try:
            fields = next(csv.reader([line]))
        except csv.Error as error:
            return Reject(where, "", "bad_row", str(error))
        fields = [fields[0], str(number), ",".join(fields[1:])] if len(fields) >= 2 else fields
    if len(fields) != 3 or not fields[0]:
        return Reject(where, "", "bad_row", "expected an image name and a caption")
    return fields[0], fields[1], fields[2], where


def _json(source: SourceFiles, path: Path) -> Iterator[Caption | Reject]:
    # "" streams every value of the top object: `images` of Karpathy's layout would come as one, so look first.
    if _is_karpathy(path):
        for key, row in stream_arrays(path, ("images",)):
            if key == "images":
                yield from _guarded(source, row, _karpathy_captions)
    else:
        for key, row in stream_arrays(path, ("",)):
            yield from _guarded(source, row, lambda source, row, key=key: _named_captions(source, row, key))


def _is_karpathy(path: Path) -> bool:
    for _, line in iter_lines(path):
        return isinstance(line, str) and '"images"' in line[:4096]
    return False


def _guarded(source: SourceFiles, row: Row | Reject, read: Any) -> Iterator[Caption | Reject]:
    if isinstance(row, Reject):
        yield row
        return
    try:
        yield from read(source, row)
    except Refused as refused:
        yield Reject(row.where, source.id, refused.reason, refused.detail)


def _karpathy_captions(source: SourceFiles, row: Row) -> list[Caption]:
    value: Mapping[str, Any] = as_object(row.value)
    wanted = (source.subset,) if source.subset else _KARPATHY[source.split]
    if text_field(value, "split") not in wanted:
        return []
    image = text_field(value, "filename")
    if value.get("filepath"):
        image = f"{text_field(value, 'filepath')}/{image}"
    return [
        (image, str(at), text_field(as_object(sentence, f"/sentences/{at}"), "raw", f"/sentences/{at}"), row.where)
        for at, sentence in enumerate(as_list(value.get("sentences"), "/sentences"))
    ]


def _named_captions(source: SourceFiles, row: Row, name: str) -> list[Caption]:
    texts = [as_text(text, f"/{at}") for at, text in enumerate(as_list(row.value, ""))]
    if texts and texts[-1].lower().endswith(_IMAGE_ENDS) and " " not in texts[-1]:
        named = texts.pop()
        if not (source.root("image") / name).is_file() and (source.root("image") / named).is_file():
            name = named
    return [(name, str(at), text, row.where) for at, text in enumerate(texts)]
