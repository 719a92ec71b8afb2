"""build.exemplars at work: which training rows stand before a row, by chance or by features/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from mmtune.errors import RecipeError
from mmtune.features.index import Kind
from mmtune.features.rows import Known, RowSearch, open_row_features, search_rows
from mmtune.features.units import KINDS, units_of
from mmtune.media.content import MediaContents
from mmtune.media.known import MediaPlace
from mmtune.prompts.chunk import Chunk
from mmtune.prompts.exemplars import POOL_ROWS, ExemplarPool, Order, RandomExemplars, answer_of, bare_id
from mmtune.prompts.mixture import Shares
from mmtune.prompts.retrieval import Card, Cards, Numbers, Wanted, pick
from mmtune.recipe import Build, BuildExemplars, Recipe, Source
from mmtune.records import Medium, Record, Reject
from mmtune.storage import Manifest, read_manifest

MOST_ROWS = 200_000
"""So many rows of a source may be found by retrieval; they rest in memory of one process."""
_CHUNKS = 8
"""So many chunks are searched for together."""
Pools = Mapping[str, tuple[Record, ...]]


def pool_size(build: Build) -> int:
    """Returns how many rows of a source may become exemplars; 0 when no row shows any."""
    if not build.shots:
        return 0
    return MOST_ROWS if _settings(build).method == "retrieval" else POOL_ROWS


def shares_of(build: Build) -> Shares | None:
    """Returns how training rows are asked, or None when all are asked plainly."""
    mixture = build.mixture
    if mixture is None:
        return Shares(build.shots) if build.shots else None
    shares = (mixture.chain_of_thought, mixture.options, mixture.inverted, mixture.delimiters)
    return Shares(build.shots, *shares)


def features_of(recipe: Recipe) -> Manifest | None:
    """Returns the manifest of the features that retrieval needs, or None without retrieval.

    Raises:
        DataError: features/ is not there.
    """
    if not recipe.build.shots or _settings(recipe.build).method != "retrieval":
        return None
    return read_manifest(recipe.run_dir / "features", made_by="extract")


def _settings(build: Build) -> BuildExemplars:
    return build.exemplars or BuildExemplars()


def pools_of(build: Build, rows: Pools) -> dict[str, dict[str, tuple[Record, ...]]]:
    """Returns, for every training source, the sources that may stand before its rows, and their rows.

    Args:
        build: The recipe's section.
        rows: Training source that is not held out to its rows that may be shown.

    Raises:
        RecipeError: exemplars.pool names what gives no training row.
    """
    pool = _settings(build).pool
    if isinstance(pool, tuple):
        for name in pool:
            if name not in rows:
                raise RecipeError(
                    f"build.exemplars.pool names {name!r}, which gives no training row",
                    f"training sources that are not held out: {', '.join(rows) or 'none'}",
                    "unknown_source",
                )
        return {source: {name: rows[name] for name in pool} for source in rows}
    if pool == "all":
        return {source: dict(rows) for source in rows}
    return {source: {source: own} for source, own in rows.items()}


def random_exemplars(
    build: Build, pools: Mapping[str, Pools], seed: int, places: Mapping[str, MediaPlace]
) -> RandomExemplars:
    """Returns what draws exemplars.

    Args:
        build: The recipe's section.
        pools: Of ``pools_of``.
        seed: Of the draw.
        places: Training source to where its media lie.
    """
    joined = {source: tuple(row for rows in own.values() for row in rows) for source, own in pools.items()}
    shown = _Contents(places)
    for row in (row for rows in joined.values() for row in rows):
        shown.learn(row)
    return RandomExemplars(joined, seed, _settings(build).balance, shown)


class _Contents:
    """Gives records the names of their media; a copy of what a row of the pool shows has that one's name."""

    def __init__(self, places: Mapping[str, MediaPlace]) -> None:
        self._places, self._contents = places, MediaContents()

    def learn(self, record: Record) -> tuple[str, ...]:
        """Returns the names of the media of a row that may be shown."""
        return tuple(self._contents.learn(self._root(record, medium), medium) for medium in record.media)

    def __call__(self, record: Record) -> Set[str]:
        """Returns the names of the media of a row that is asked."""
        return {self._contents.name(self._root(record, medium), medium) for medium in record.media}

    def _root(self, record: Record, medium: Medium) -> str:
        # A history has no root.
        return self._places[record.source].roots.get(medium.modality, "")


@dataclass(frozen=True)
class _Pool:
    """Rows that may be shown, ready to be searched."""

    rows: tuple[Record, ...]
    cards: Cards
    search: RowSearch


class NearExemplars:
    """Finds the nearest training rows of the rows of a chunk.

    Args:
        recipe: The recipe.
        pools: Of ``pools_of``.
        manifest: Of features/.
        places: Training source to where its media lie.
        media_root: The folder above all media of the build.

    Attributes:
        kinds: What rows are compared by.
        without: Rows so far that have nothing to be compared by.

    Raises:
        DataError: The features were made of other rows.
        IntegrityError: They are of another media root.
    """

    def __init__(
        self,
        recipe: Recipe,
        pools: Mapping[str, Pools],
        manifest: Manifest,
        places: Mapping[str, MediaPlace],
        media_root: str,
    ) -> None:
        settings = _settings(recipe.build)
        self._wanted = Wanted(max(recipe.build.shots), settings.diversity, settings.balance)
        self._features = open_row_features(
            recipe.run_dir / "features",
            settings.by,
            made={kind: rows for kind, rows in manifest.rows.items() if kind in KINDS},
            metric=manifest.config["index"]["metric"],
            made_of=manifest.facts["media_root"],
            media_root=media_root,
        )
        self._places, self._numbers, self._contents = places, Numbers(), _Contents(places)
        self.kinds, self.without = self._features.kinds, 0
        made: dict[tuple[str, ...], _Pool | None] = {}
        self._pools: dict[str, _Pool | None] = {}
        for source, own in pools.items():
            key = tuple(own)
            if key not in made:
                made[key] = self._pool(own, manifest, recipe.seed)
            self._pools[source] = made[key]

    def _pool(self, own: Pools, manifest: Manifest, seed: int) -> _Pool | None:
        rows = [row for records in own.values() for row in records]
        for row in rows:
            self._contents.learn(row)
        units, cards = self._looked_up(rows)
        vectors, has = self._features.vectors(units, [row.id for row in rows])
        kept = [at for at, there in enumerate(has) if there]
        if not kept:
            return None
        index = manifest.config["index"]
        kind: Kind = "exact" if index["kind"] == "none" else index["kind"]
        search = search_rows(vectors[has], kind=kind, metric=index["metric"], seed=seed)
        return _Pool(tuple(rows[at] for at in kept), self._numbers.of([cards[at] for at in kept]), search)

    def _looked_up(self, rows: Sequence[Record]) -> tuple[list[list[Known]], list[Card]]:
        """Returns what every row is in features/, and its card."""
        units, cards = [], []
        for row in rows:
            found = list(units_of(row, self._places[row.source]))
            media = tuple(sorted(self._contents(row)))
            text = "" if media else next((unit.id for unit in found if unit.kind == "text"), "")
            units.append([(str(unit.kind), unit.id) for unit in found])
            cards.append(Card(bare_id(row.id), row.source, media, text, answer_of(row)))
        return units, cards

    def attach(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the chunks with the exemplars of their training rows, as many as a row may show.

        Chunks of one source are searched for together: a search of few rows takes nearly as long as one of many.
        """
        waiting: list[Chunk] = []
        for chunk in chunks:
            if waiting and (chunk.source != waiting[0].source or len(waiting) == _CHUNKS):
                yield from self._attached(waiting)
                waiting = []
            waiting.append(chunk)
        yield from self._attached(waiting)

    def _attached(self, chunks: list[Chunk]) -> list[Chunk]:
        items = [item for chunk in chunks for item in chunk.items]
        rows = [item for item in items if isinstance(item, Record) and not item.messages]
        if not rows or chunks[0].split != "train":
            return chunks
        found = self._nearest(rows)
        names = [[item.id for item in chunk.items if isinstance(item, Record)] for chunk in chunks]
        own = [{name: found[name] for name in ids if name in found} for ids in names]
        return [replace(chunk, exemplars=exemplars) for chunk, exemplars in zip(chunks, own, strict=True)]

    def _nearest(self, rows: list[Record]) -> dict[str, tuple[Record, ...]]:
        pool = self._pools.get(rows[0].source)
        units, cards = self._looked_up(rows)
        vectors, has = self._features.vectors(units, [row.id for row in rows])
        self.without += int((~has).sum())
        if pool is None or not has.any():
            return {}
        asked = [row for row, there in zip(rows, has, strict=True) if there]
        own = vectors[has]
        picked = pick(
            self._numbers.of([card for card, there in zip(cards, has, strict=True) if there]),
            pool.cards,
            lambda chosen, number: pool.search.near(own[chosen], number),
            pool.search.alike,
            self._wanted,
        )
        return {
            row.id: tuple(pool.rows[at] for at in found if at >= 0) for row, found in zip(asked, picked, strict=True)
        }


@dataclass(frozen=True)
class Shown:
    """How training rows show exemplars.

    Attributes:
        shares: How many, or None when no row shows any and none is asked in a style of its own.
        method: ``random`` or ``retrieval``.
        order: How they stand.
        pools: Of ``pools_of``.
        choose: Draws them in the process that builds a row, or None.
        near: Finds them for a whole chunk, or None.
    """

    shares: Shares | None
    method: str
    order: Order
    pools: Mapping[str, Pools]
    choose: RandomExemplars | None = None
    near: NearExemplars | None = None

    def attach(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Returns the chunks with their exemplars, where these are found for whole chunks."""
        return chunks if self.near is None else self.near.attach(chunks)

    def facts(self, asked: Mapping[str, int]) -> dict[str, Any]:
        """Returns what the manifest says of the exemplars; tokenize reads ``order`` to leave out the farthest.

        Args:
            asked: Training rows by how they are asked.
        """
        shots = {name.removeprefix("shots_"): count for name, count in asked.items() if name.startswith("shots_")}
        return {
            "method": self.method,
            "order": self.order,
            "by": list(self.near.kinds) if self.near else [],
            "pool": {source: sum(map(len, own.values())) for source, own in self.pools.items()},
            "no_features": self.near.without if self.near else 0,
            "shots": dict(sorted(shots.items(), key=lambda item: int(item[0]))),
        }


def plan_exemplars(
    recipe: Recipe, rows: Pools, places: Mapping[str, MediaPlace], media_root: str, features: Manifest | None
) -> Shown:
    """Returns how training rows show exemplars.

    Args:
        recipe: The recipe.
        rows: Training source that is not held out to its rows that may be shown.
        places: Training source to where its media lie.
        media_root: The folder above all media.
        features: Manifest of features/, for retrieval.

    Raises:
        RecipeError: A source is unknown, or there are no features of a kind.
        DataError: The features were made of other rows.
        IntegrityError: They are of another media root.
    """
    build, settings = recipe.build, _settings(recipe.build)
    pools = pools_of(build, rows)
    shown = Shown(shares_of(build), settings.method, settings.shown, pools)
    if features is not None:
        return replace(shown, near=NearExemplars(recipe, pools, features, places, media_root))
    return replace(shown, choose=random_exemplars(build, pools, recipe.seed, places) if build.shots else None)


def gather_pools(
    sources: Sequence[Source], read: Callable[[int], Iterator[Record | Reject]], seed: int, size: int
) -> dict[str, tuple[Record, ...]]:
    """Returns every training source's rows that may become exemplars, after one pass over each.

    Args:
        sources: All sources of the recipe.
        read: Number of a source to its items, from the start.
        seed: Of the choice of rows.
        size: Most rows of a source.
    """
    pools = {}
    for at, source in enumerate(sources):
        if source.split == "train":
            pool = ExemplarPool(seed, size)
            for item in read(at):
                if isinstance(item, Record):
                    pool.see(item)
            pools[source.id] = pool.rows()
    return pools
