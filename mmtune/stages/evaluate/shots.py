"""eval.shots at work: training rows of instructions/ before every question, by chance or by features/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.choice import in_shares
from mmtune.errors import DataError, RecipeError
from mmtune.evaluation.rows import ChosenExamples, EvalRows
from mmtune.features.rows import Known, RowFeatures, RowSearch, open_row_features, search_rows
from mmtune.media.content import MediaContents
from mmtune.prompts.exemplars import POOL_ROWS, drawn, in_turns, shown_ranks
from mmtune.prompts.retrieval import Card, Cards, Numbers, Wanted, majority, pick
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.shots import card_of, name_of, own_media, unfit, with_shots
from mmtune.recipe import Eval, Exemplars, Recipe
from mmtune.records import Example
from mmtune.storage import Manifest, open_split, read_manifest

MOST_ROWS = 200_000
"""So many training rows may be found by retrieval."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Way:
    """One way of asking every row.

    Attributes:
        name: Such as ``4 retrieval``, or ``4 retrieval by text`` where others are by images; empty for the rows as they
            stand.
        shots: Exemplars of a row.
        settings: How they are chosen.
    """

    name: str
    shots: int
    settings: Exemplars


def ways_of(settings: Eval, built: Mapping[str, Any] | None = None) -> list[Way]:
    """Returns the ways of asking that a recipe names, those without exemplars first.

    Args:
        settings: The recipe's eval part.
        built: ``build.exemplars`` that the rows were made with; its pool is taken where eval names none.
    """
    ways: list[Way] = []
    for shots in sorted(settings.shots):
        for given in settings.exemplars if shots else settings.exemplars[:1]:
            own = given
            alike = [one for one in settings.exemplars if one.method == given.method]
            if built and "pool" not in given.model_fields_set:
                pool = built["pool"]
                own = given.model_copy(update={"pool": pool if isinstance(pool, str) else tuple(pool)})
            name = f"{shots} {_told_apart(given, alike)}" if shots else ""
            again = sum(way.name == name or way.name.startswith(f"{name} (") for way in ways) if name else 0
            ways.append(Way(f"{name} ({again + 1})" if again else name, shots, own))
    return ways


def _told_apart(way: Exemplars, alike: Sequence[Exemplars]) -> str:
    """Returns how exemplars are chosen, in as many words as tell it from other ways of the same method."""

    def differs(key: str) -> bool:
        return len({getattr(one, key) for one in alike}) > 1

    said = [f"by {' and '.join(way.by)}"] if differs("by") and way.by else []
    said += [way.order.replace("_", " ")] if differs("order") else []
    said += [f"diversity {way.diversity:g}"] if differs("diversity") and way.diversity else []
    said += ["balance"] if differs("balance") and way.balance else []
    said += [f"pool {way.pool if isinstance(way.pool, str) else '+'.join(way.pool)}"] if differs("pool") else []
    return " ".join([way.method, *said])


def features_of(recipe: Recipe, settings: Eval) -> Manifest | None:
    """Returns the manifest of the features that retrieval needs, or None without retrieval.

    Raises:
        DataError: features/ is not there.
    """
    if not any(way.shots and way.settings.method == "retrieval" for way in ways_of(settings)):
        return None
    return read_manifest(recipe.run_dir / "features", made_by="extract")


class TrainRows:
    """The training rows that may be shown.

    Args:
        folder: ``instructions/train``.
        media_root: Of all rows.

    Raises:
        DataError: There is none that could be an exemplar.
    """

    def __init__(self, folder: Path, media_root: str) -> None:
        if not folder.is_dir():
            raise DataError(
                "eval.shots shows training rows, and instructions/ has none",
                "add a source with `split: train` and run: mmtune build-data; or set eval.shots: 0",
                "no_exemplars",
            )
        table = open_split(folder)
        self._examples = ChosenExamples(table.to_batches(), row_to_example, None)
        self._contents, self._media_root = MediaContents(), media_root
        self.rows: list[int] = []
        self.cards: list[Card] = []
        self.units: list[list[Known]] = []
        self._unfit = Counter[str]()
        kept = None
        if table.num_rows > MOST_ROWS:
            kept = set(in_shares(table.column("id").to_pylist(), table.column("source").to_pylist())[:MOST_ROWS])
        for at, row in enumerate(row for batch in table.to_batches() for row in batch.to_pylist()):
            if kept is None or at in kept:
                self._see(at, row_to_example(row))
        if not self.rows:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in self._unfit.most_common())
            raise DataError(
                f"no training row can be an exemplar: {why or 'there is none'}",
                "set eval.shots: 0, or add a source with `split: train` whose reader knows question and answer (table)",
                "no_exemplars",
            )

    def _see(self, at: int, example: Example) -> None:
        if reason := unfit(example):
            self._unfit[reason] += 1
        else:
            self.rows.append(at)
            self.cards.append(card_of(example, partial(self._contents.learn, self._media_root)))
            self.units.append(units_of_example(example))

    def card(self, example: Example) -> Card:
        """Returns the card of a row that is asked; a copy of a training row's medium has that one's name."""
        return card_of(example, partial(self._contents.name, self._media_root))

    def __call__(self, row: int) -> Example:
        """Returns a row by its number among those that may be shown."""
        return self._examples(self.rows[row])

    def of(self, source: str, pool: Any) -> tuple[str, ...]:
        """Returns the sources whose rows may stand before those of a source.

        Raises:
            RecipeError: ``eval.exemplars.pool`` names what has no training row.
        """
        there = dict.fromkeys(card.source for card in self.cards)
        if isinstance(pool, tuple):
            for name in pool:
                if name not in there:
                    raise RecipeError(
                        f"eval.exemplars.pool names {name!r}, which has no training row in instructions/",
                        f"there are: {', '.join(there)}",
                        "unknown_source",
                    )
            return pool
        return tuple(there) if pool == "all" else (source,)

    def numbers(self, sources: Sequence[str]) -> list[int]:
        """Returns the rows of some sources."""
        return [at for at, card in enumerate(self.cards) if card.source in sources]


def units_of_example(example: Example) -> list[Known]:
    """Returns what a finished row's question is in features/."""
    media = [(str(medium.modality), name_of(medium)) for medium in own_media(example)]
    named = [(kind, name) for kind, _, name in (one.partition("/") for one in example.feature_ids)]
    return [*media, *named]


Found = list[tuple[int, ...]]
"""Per row, its exemplars among ``TrainRows``, nearest first."""


def random_shots(train: TrainRows, rows: Sequence[Example], way: Way, seed: int) -> Found:
    """Returns exemplars drawn by seed and row id, of at most ``POOL_ROWS`` rows of each pool, see ``in_shares``."""
    pools: dict[str, list[int]] = {}
    found = []
    for example in rows:
        if example.source not in pools:
            own = train.numbers(train.of(example.source, way.settings.pool))
            cards = [train.cards[row] for row in own]
            few = in_shares([card.id for card in cards], [card.source for card in cards])[:POOL_ROWS]
            pools[example.source] = [own[at] for at in sorted(few)]
        pool, card = pools[example.source], train.card(example)
        order = [pool[at] for at in drawn(len(pool), seed, example.id)]
        fit = [row for row in order if not _same(train.cards[row], card)] if example.template_id else []
        if way.settings.balance:
            fit = in_turns(fit, way.shots, lambda row: train.cards[row].label)
        found.append(tuple(fit[: way.shots]))
    return found


def _same(one: Card, other: Card) -> bool:
    shared = bool(set(one.media) & set(other.media))
    return one.id == other.id or shared or (bool(one.text) and one.text == other.text)


@dataclass(frozen=True)
class _Pool:
    rows: np.ndarray
    cards: Cards
    search: RowSearch


class NearShots:
    """Finds the nearest training rows of rows that are asked.

    Args:
        train: The rows that may be shown.
        features: The features they are compared by.
        index: Kind of the search index.
        seed: Of approximate indexes.
    """

    def __init__(self, train: TrainRows, features: RowFeatures, index: str, seed: int) -> None:
        self._train, self._features, self._seed = train, features, seed
        self._kind: Any = "exact" if index == "none" else index
        self._numbers = Numbers()
        self._pools: dict[tuple[str, ...], _Pool | None] = {}

    def _pool(self, sources: tuple[str, ...]) -> _Pool | None:
        if sources not in self._pools:
            rows = np.asarray(self._train.numbers(sources), np.int64)
            made = None
            if rows.size:
                units = [self._train.units[row] for row in rows]
                vectors, has = self._features.vectors(units, [self._train.cards[row].id for row in rows])
                rows = rows[has]
                if rows.size:
                    search = search_rows(vectors[has], kind=self._kind, metric=self._features.metric, seed=self._seed)
                    made = _Pool(rows, self._numbers.of([self._train.cards[row] for row in rows]), search)
            self._pools[sources] = made
        return self._pools[sources]

    def __call__(self, rows: Sequence[Example], way: Way) -> Found:
        """Returns the exemplars of rows; none where a row has nothing to be compared by."""
        found: Found = [()] * len(rows)
        by_source: dict[str, list[int]] = {}
        for at, example in enumerate(rows):
            if example.template_id:
                by_source.setdefault(example.source, []).append(at)
        for source, places in by_source.items():
            pool = self._pool(self._train.of(source, way.settings.pool))
            for start in range(0, len(places) if pool else 0, _AT_ONCE):
                assert pool is not None
                self._some(rows, places[start : start + _AT_ONCE], pool, way, found)
        return found

    def _some(self, rows: Sequence[Example], places: list[int], pool: _Pool, way: Way, found: Found) -> None:
        vectors, has = self._features.vectors(
            [units_of_example(rows[at]) for at in places], [rows[at].id for at in places]
        )
        places, own = [at for at, there in zip(places, has, strict=True) if there], vectors[has]
        picked = pick(
            self._numbers.of([self._train.card(rows[at]) for at in places]),
            pool.cards,
            lambda asked, number: pool.search.near(own[asked], number),
            pool.search.alike,
            Wanted(way.shots, way.settings.diversity, way.settings.balance),
        )
        for at, own_rows in zip(places, picked, strict=True):
            found[at] = tuple(int(pool.rows[row]) for row in own_rows if row >= 0)


@dataclass(frozen=True)
class Asked:
    """The same rows in every way.

    Attributes:
        rows: Way to its rows.
        votes: Way to what its exemplars answer by majority, of retrieval.
        facts: What the report says of each way with exemplars.
    """

    rows: Mapping[str, EvalRows]
    votes: Mapping[str, list[str]]
    facts: list[dict[str, Any]]


def asked_rows(
    recipe: Recipe,
    settings: Eval,
    plain: EvalRows,
    make: Callable[..., EvalRows],
    instructions: Manifest,
    features: Manifest | None,
) -> Asked:
    """Returns the kept rows in every way that the recipe names.

    Args:
        recipe: The recipe.
        settings: Its eval part.
        plain: The rows without exemplars, examined.
        make: ``(count, example, ranks=...)`` to rows that are not examined yet.
        instructions: Manifest of instructions/.
        features: Manifest of features/, for retrieval.

    Raises:
        RecipeError: A pool is unknown or gives no row any exemplar, or there are no features of a kind.
        DataError: There are no training rows, or the features are of other rows.
    """
    ways = ways_of(settings, instructions.config["build"].get("exemplars"))
    if not any(way.shots for way in ways):
        return Asked({"": plain}, {}, [])
    train = TrainRows(recipe.run_dir / "instructions" / "train", instructions.facts["media_root"])
    examples = [plain.example(row) for row in range(len(plain.kept))]
    rows: dict[str, EvalRows] = {}
    votes: dict[str, list[str]] = {}
    facts = []
    for way in ways:
        if not way.shots:
            rows[way.name] = plain
            continue
        if way.settings.method == "random":
            found = random_shots(train, examples, way, recipe.seed)
        else:
            assert features is not None
            made = _features(recipe, way, instructions, features)
            found = NearShots(train, made, features.config["index"]["kind"], recipe.seed)(examples, way)
            votes[way.name] = [majority(train.cards[row].label for row in own) for own in found]
        _check_some(way, found, examples, train)
        rows[way.name] = _with_shots(examples, found, train, way, make, recipe.seed)
        facts.append(_facts(way, found, rows[way.name]))
    return Asked(rows, votes, facts)


def _check_some(way: Way, found: Found, rows: Sequence[Example], train: TrainRows) -> None:
    """Raises RecipeError where no row has any exemplar: what is asked so would be zero-shot by another name."""
    if any(found):
        return
    asked = dict.fromkeys(example.source for example in rows)
    there = ", ".join(dict.fromkeys(card.source for card in train.cards))
    pool = way.settings.pool if isinstance(way.settings.pool, str) else f"[{', '.join(way.settings.pool)}]"
    raise RecipeError(
        f"eval.shots: no row has an exemplar ({way.name}); eval.exemplars.pool is {pool},"
        f" rows are of {', '.join(asked)}",
        f"training rows that may be shown are of {there}: set eval.exemplars.pool to all, or name some;"
        " or set eval.shots: 0",
        "no_exemplars",
    )


def _features(recipe: Recipe, way: Way, instructions: Manifest, features: Manifest) -> RowFeatures:
    return open_row_features(
        recipe.run_dir / "features",
        way.settings.by,
        made=features.rows,
        metric=features.config["index"]["metric"],
        made_of=features.facts["media_root"],
        media_root=instructions.facts["media_root"],
    )


def _with_shots(
    examples: Sequence[Example], found: Found, train: TrainRows, way: Way, make: Callable[..., EvalRows], seed: int
) -> EvalRows:
    order = way.settings.shown

    def example(number: int) -> Example:
        own = examples[number]
        return with_shots(own, [train(row) for row in found[number]], order, f"{seed}\0{own.id}")

    def ranks(own: Example) -> list[int]:
        return shown_ranks(order, len(own.exemplar_ids), f"{seed}\0{own.id}")

    rows = make(len(examples), example, ranks=ranks)
    for _ in rows.examine():
        pass
    if len(rows.kept) != len(examples):
        # Without any exemplar a row is what was kept before; it fits.
        raise DataError(f"{rows.rejects[0].id} cannot be asked with exemplars: {rows.rejects[0].detail}", "", "no_rows")
    return rows


def _facts(way: Way, found: Found, rows: EvalRows) -> dict[str, Any]:
    count = sum(map(len, found))
    return {
        "name": way.name,
        "shots": way.shots,
        **way.settings.model_dump(mode="json"),
        "shown": count - sum(rows.dropped),
        "dropped": sum(rows.dropped),
        "rows_with_dropped": sum(number > 0 for number in rows.dropped),
        "rows_with_fewer_found": sum(len(own) < way.shots for own in found),
    }
