"""The rows of a search: dev and exemplars out of train, test rows that nothing is chosen by."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.choice import in_shares
from mmtune.errors import DataError, RecipeError
from mmtune.media.content import names_beside
from mmtune.prompts.search import Solved
from mmtune.prompts.searched import slot_names
from mmtune.records import Example, Medium
from mmtune.storage import Manifest, open_split

_MOST_LOOKED_AT = 20
"""So many times the rows that are wanted are looked at before a search makes do with fewer."""


@dataclass(frozen=True)
class Rows:
    """The rows of a search.

    Attributes:
        dev: Prompts are scored on them.
        pool: May become exemplars, show a proposer what is asked, and are gepa's feedback rows; none shares a medium or
            its text with a dev row.
        test: The result is scored on them.
    """

    dev: tuple[Example, ...]
    pool: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def slots(self) -> frozenset[str]:
        """Names that every row has a value for."""
        return frozenset.intersection(*(slot_names(one) for one in (*self.dev, *self.pool, *self.test)))


def choose_rows(
    folder: Path, manifest: Manifest, *, sources: Sequence[str], dev: int, pool: int, test: int, test_split: str
) -> Rows:
    """Returns rows of every source at its share, see ``in_shares``: dev first, then what does not touch it.

    Args:
        folder: instructions/.
        manifest: Its manifest.
        sources: Rows of these alone; empty for all.
        dev: Most dev rows.
        pool: Most rows of the pool.
        test: Most test rows.
        test_split: Their split, not train.

    Raises:
        RecipeError: A source is unknown.
        DataError: A split is empty, or all dev rows have the same answer.
    """
    known = {fact["id"] for fact in manifest.facts.get("sources", ())}
    unknown = [name for name in sources if name not in known]
    if unknown:
        raise RecipeError(
            f"prompt.sources names {unknown[0]!r}", f"sources: {', '.join(sorted(known))}", "unknown_source"
        )
    for split in ("train", test_split):
        if not manifest.rows.get(split):
            raise DataError(
                f"instructions/ has no rows in the split {split!r}, which the prompt search needs",
                f"add a source with `split: {split}` (dev rows come from train) and run: mmtune build-data",
                "split_missing",
            )
    train = _in_shares(open_split(folder / "train"), sources)
    chosen = _take(train, dev, lambda example: True)
    name = names_beside(manifest.facts["media_root"], (medium for one in chosen for medium in one.media))
    touched = {what for one in chosen for what in _touches(one, name)}
    spare = _take(train, pool, lambda example: touched.isdisjoint(_touches(example, name)))
    tested = _take(_in_shares(open_split(folder / test_split), sources), test, lambda example: True)
    _check(chosen, tested, test_split)
    return Rows(tuple(chosen), tuple(spare), tuple(tested))


def solved(example: Example) -> Solved:
    """Returns a row as a proposer reads it."""
    asked = next((message.text for message in reversed(example.messages) if message.role == "user"), "")
    return Solved(example.id, asked, answer_of(example), example.options)


def answer_of(example: Example) -> str:
    """Returns the answer that is taught, or the first reference."""
    last = example.messages[-1]
    return last.text if last.role == "assistant" else next(iter(example.references), "")


def _in_shares(table: Any, sources: Sequence[str]) -> Iterator[Example]:
    from mmtune.prompts.schema import row_to_example

    ids, own = table.column("id").to_pylist(), table.column("source").to_pylist()
    numbers = [at for at in range(len(ids)) if not sources or own[at] in sources]
    for place in in_shares([ids[at] for at in numbers], [own[at] for at in numbers]):
        example = row_to_example(table.slice(numbers[place], 1).to_pylist()[0])
        if (example.references or answer_of(example)) and any(turn.role == "user" for turn in example.messages):
            yield example


def _take(rows: Iterator[Example], count: int, fits: Callable[[Example], bool]) -> list[Example]:
    out: list[Example] = []
    for example in itertools.islice(rows, _MOST_LOOKED_AT * max(count, 50)):
        if fits(example):
            out.append(example)
        if len(out) == count:
            break
    return out


def _touches(example: Example, name: Callable[[Medium], str]) -> list[str]:
    """Returns what tells rows to be the same: names of their media, or where there are none their words."""
    return [name(medium) for medium in example.media] or [solved(example).asked]


def _check(dev: Sequence[Example], test: Sequence[Example], test_split: str) -> None:
    if not dev or not test:
        raise DataError(
            f"{len(dev)} dev rows and {len(test)} rows of {test_split} have an answer; the search needs both",
            "check prompt.sources and the splits",
            "no_rows",
        )
    answers = Counter(answer_of(example) for example in dev)
    if len(answers) == 1:
        raise DataError(
            f"all {len(dev)} dev rows have the answer {next(iter(answers))!r}: what always says it would win",
            "raise prompt.dev, or mix the sources",
            "single_class",
        )
