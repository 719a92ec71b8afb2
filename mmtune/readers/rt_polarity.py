"""Sentence polarity v1.0 (Pang and Lee 2005): film review snippets, one a line, in a file per label.

``rt-polarity.pos``::

    the rock is destined to be the 21st century's new " conan " and that he's going to make a splash even ...
    effective but too-tepid biopic

``path`` is the folder of ``rt-polarity.neg`` and ``rt-polarity.pos``. The files have no splits: ``part`` of
a source makes some.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmtune.errors import DataError
from mmtune.readers.source import SourceFiles
from mmtune.readers.strict_json import iter_lines
from mmtune.records import Record, Reject

LABELS = {"neg": "negative", "pos": "positive"}
"""End of the file's name to its label, in the order of the options."""


def read_rt_polarity(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per line: the negative ones, then the positive ones.

    Raises:
        DataError: A file is missing or holds no line.
    """
    folder = source.file("path")
    for end, label in LABELS.items():
        path = folder / f"rt-polarity.{end}"
        if not path.is_file():
            raise DataError(f"{path} is not there", "`path` is the folder of both files", "file_missing")
        found = False
        for number, line in iter_lines(path):
            found = True
            if isinstance(line, Reject):
                yield line
                continue
            yield Record(
                id=f"{source.id}/{end}-{number}",
                source=source.id,
                task="sentiment_analysis",
                split=source.split,
                text=line.strip(),
                references=(label,),
                options=tuple(LABELS.values()),
                where=f"{path.name}:{number}",
            )
        if not found:
            raise DataError(f"{path} holds no rows", "check the file; an empty source is never skipped", "empty_input")
