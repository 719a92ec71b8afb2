"""CoNLL: a token and its entity tag per line, a blank line between sentences.

``wnut17train.conll`` (a tab between the columns; files with spaces are read too)::

    weeks	O
    .	O
    Empire	B-location
    State	I-location
    Building	I-location
    =	O
    ESB	B-location

The answer lists the entities in reading order as ``location: Empire State Building; location: ESB``, or
says ``none``. Entities begin and end by the rules of ``conlleval`` and seqeval: BIO and IOB1 alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mmtune.errors import DataError
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_lines
from mmtune.records import Record, Reject

NONE = "none"
_DOCUMENT = "-DOCSTART-"
Line = tuple[int, str | Reject]


def read_conll(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per sentence; a sentence with a line that is no token and tag is refused.

    Raises:
        DataError: The file is missing, or holds no sentence.
    """
    path = source.file("path")
    types = _types(iter_lines(path))
    if not types:
        raise DataError(f"{path} tags no entity", "a CoNLL file has a tag in its last column", "empty_input")

    def sentences() -> Iterator[Row | Reject]:
        for index, lines in enumerate(_sentences(iter_lines(path))):
            first = lines[0][0]
            wrong = next((line for _, line in lines if isinstance(line, Reject)), None)
            yield wrong if wrong is not None else Row(f"{path.name}:{first}", index, [line for _, line in lines])

    def record(row: Row) -> list[Record]:
        tokens, tags = zip(*(_columns(line) for line in row.value), strict=True)
        spans = entity_spans(tags)
        answer = "; ".join(f"{kind}: {' '.join(tokens[start:end])}" for kind, start, end in spans)
        return [
            Record(
                id=f"{source.id}/{source.split}-{row.index}",
                source=source.id,
                task="named_entity_recognition",
                split=source.split,
                text=" ".join(tokens),
                references=(answer or NONE,),
                fields={"types": ", ".join(types)},
                where=row.where,
            )
        ]

    yield from read_rows(sentences(), record, source=source)


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns ``(type, start, end)`` of every entity of a sentence, the end exclusive.

    Args:
        tags: ``B-type``, ``I-type`` or ``O`` per token. An ``I-`` that does not continue an entity of
            its type begins one, as in ``conlleval`` and seqeval's default mode.
    """
    spans: list[tuple[str, int, int]] = []
    for at, tag in enumerate(tags):
        head, _, kind = tag.partition("-")
        if head not in ("B", "I"):
            continue
        if head == "I" and spans and spans[-1][2] == at and spans[-1][0] == kind:
            spans[-1] = (kind, spans[-1][1], at + 1)
        else:
            spans.append((kind, at, at + 1))
    return spans


def _sentences(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Yields the lines of each sentence; blank lines are not among them, so a gap in the numbers parts two."""
    kept: list[Line] = []
    for number, line in lines:
        if kept and number != kept[-1][0] + 1:
            yield kept
            kept = []
        if isinstance(line, Reject) or not line.startswith(_DOCUMENT):
            kept.append((number, line))
    if kept:
        yield kept


def _columns(line: str) -> tuple[str, str]:
    cells = line.split("\t") if "\t" in line else line.split()
    token, tag = cells[0].strip(), cells[-1].strip()
    if len(cells) < 2 or not token or not (tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)):
        raise Refused("bad_field", f"expected a token and its tag (O, B-type or I-type), found {line[:80]!r}")
    return token, tag


def _types(lines: Iterator[Line]) -> list[str]:
    tags = (line.rpartition("\t" if "\t" in line else " ")[2].strip() for _, line in lines if isinstance(line, str))
    return [kind for kind, _ in groupby(sorted(tag[2:] for tag in tags if tag[:2] in ("B-", "I-")))]
