"""TweetEval (Barbieri et al. 2020): a text file, a file of label numbers, and the labels' names.

``val_text.txt``, ``val_labels.txt`` and ``mapping.txt``::

    @user @user Oh, hidden revenge and anger...I rememberthe time,she rebutted you.     0     0	anger
    if not then #teamchristine bc all tana has done is provoke her by tweeting ...      0     1	joy

``path`` is the folder; ``split`` chooses the files, or ``subset`` does by the name before ``_text.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmtune.errors import DataError
from mmtune.readers.source import SourceFiles
from mmtune.readers.strict_json import iter_lines
from mmtune.records import Record, Reject


def read_tweeteval(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per line of the text file; a line without a known label is refused.

    Raises:
        DataError: A file is missing, or texts and labels are not equally many.
    """
    folder, part = source.file("path"), source.subset or source.split
    names = _names(_existing(folder / "mapping.txt"))
    texts = _existing(folder / f"{part}_text.txt")
    labels = {number: str(line).strip() for number, line in iter_lines(_existing(folder / f"{part}_labels.txt"))}
    last = 0
    for number, line in iter_lines(texts):
        last = number
        where, own = f"{texts.name}:{number}", f"{source.id}/{part}-{number}"
        if isinstance(line, Reject):
            yield line
            continue
        label = names.get(labels.get(number, ""))
        if label is None:
            yield Reject(where, own, "no_label", f"the label {labels.get(number, '')!r} is not in mapping.txt")
            continue
        yield Record(
            id=own,
            source=source.id,
            task="sentiment_analysis",
            split=source.split,
            text=line.strip(),
            references=(label,),
            options=tuple(names.values()),
            where=where,
        )
    if last != max(labels, default=0):
        raise DataError(
            f"{texts} ends with line {last}, its labels with line {max(labels, default=0)}",
            "fetch both files again",
            "label_mismatch",
        )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is not there", "`path` is the folder of the official files", "file_missing")
    return path


def _names(path: Path) -> dict[str, str]:
    pairs = (str(line).split("\t") for _, line in iter_lines(path))
    return {cells[0].strip(): cells[1].strip() for cells in pairs if len(cells) == 2}
