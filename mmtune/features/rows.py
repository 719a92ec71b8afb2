"""Rows of a dataset as vectors: each row is the mean of what its media, text or history are in features/.

Shapes: R rows, D width of all kinds together, Q questions, P pool, N candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.features.index import Kind, SearchIndex, search_among
from mmtune.features.neighbours import Metric, Vectors, prepared
from mmtune.features.table import FeatureTable, open_features

Known = tuple[str, str]
"""Kind and id of a unit of features/."""
_NUMBERS = 1 << 24


@dataclass(frozen=True)
class RowFeatures:
    """The features that rows are compared by.

    Attributes:
        folder: The features folder.
        kinds: What is compared.
        metric: How.
        tables: Kind to its features.
        pools: Kind to its pooled vectors, or the reduced ones, as they are compared.
        refused: Ids of what extract refused.
    """

    folder: Path
    kinds: tuple[str, ...]
    metric: Metric
    tables: Mapping[str, FeatureTable]
    pools: Mapping[str, Vectors]
    refused: frozenset[str]

    def vectors(self, rows: Sequence[Sequence[Known]], names: Sequence[str]) -> tuple[Vectors, NDArray[np.bool_]]:
        """Returns ``(R, D)`` vectors, and ``(R,)`` whether a row has any of what is compared.

        Under ``cosine`` every kind has the same weight: a row is the unit vectors of its kinds one behind the other,
        zeros where it has nothing of a kind.

        Args:
            rows: The units of every row.
            names: The rows' ids.

        Raises:
            DataError: A unit is not known to the features: they were made of other rows (``features_stale``).
        """
        has = np.zeros(len(rows), np.bool_)
        parts = []
        for kind in self.kinds:
            vectors, own = self._of_kind(kind, rows, names)
            has |= own
            parts.append(vectors)
        return prepared(np.concatenate(parts, axis=1), self.metric, "the rows' vectors"), has

    def _of_kind(
        self, kind: str, rows: Sequence[Sequence[Known]], names: Sequence[str]
    ) -> tuple[Vectors, NDArray[np.bool_]]:
        table, pool = self.tables[kind], self.pools[kind]
        owners, units = [], []
        for at, row in enumerate(rows):
            for own, name in row:
                if own != kind:
                    continue
                place = table.row_of(name)
                if place is not None:
                    owners.append(at)
                    units.append(place)
                elif name not in self.refused:
                    raise _stale(self.folder, kind, names[at])
        total = np.zeros((len(rows), pool.shape[1]), np.float32)
        np.add.at(total, owners, pool[units])
        counts = np.bincount(np.asarray(owners, np.int64), minlength=len(rows))
        if self.metric != "cosine":
            total /= np.maximum(counts, 1)[:, None].astype(np.float32)
        return prepared(total, self.metric, f"the features of {kind}"), counts > 0


def open_row_features(
    folder: Path,
    kinds: Sequence[str],
    *,
    made: Mapping[str, int],
    metric: Metric,
    made_of: str,
    media_root: str,
) -> RowFeatures:
    """Returns the features that rows are compared by.

    Args:
        folder: The features folder.
        kinds: What is compared; nothing: all that there is.
        made: Kind to its rows, as the folder's manifest says.
        metric: How they are compared.
        made_of: The folder above all media of the features.
        media_root: The same of the rows.

    Raises:
        RecipeError: There are no features of a kind (``features_missing``).
        IntegrityError: A file is damaged, or they are of media elsewhere (``features_stale``).
    """
    if made_of != media_root:
        raise IntegrityError(
            f"{folder} is of media below {made_of}, these rows' are below {media_root}",
            "run: mmtune extract (with the same sources)",
            "features_stale",
        )
    wanted: tuple[str, ...] = tuple(kinds) or tuple(made)
    for kind in wanted:
        if not made.get(kind):
            raise RecipeError(
                f"exemplars.by asks for {kind}, and {folder} holds features of {', '.join(made) or 'nothing'}",
                f"add {kind} to extract.modalities and run: mmtune extract; or leave it out of exemplars.by",
                "features_missing",
            )
    tables = {kind: open_features(folder, kind) for kind in wanted}
    pools = {kind: prepared(one.compared(), metric, f"the features of {kind}") for kind, one in tables.items()}
    return RowFeatures(folder, wanted, metric, tables, pools, frozenset(_refused(folder / "rejects.jsonl")))


def _refused(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8") as handle:
            yield from (json.loads(line)["id"] for line in handle)


def _stale(folder: Path, kind: str, row: str) -> DataError:
    return DataError(
        f"{folder} was made of other rows: it does not know the {kind} of {row!r}",
        "run: mmtune extract (with the same sources, and no smaller --limit)",
        "features_stale",
    )


@dataclass(frozen=True)
class RowSearch:
    """The nearest rows of a pool, and how like its rows are.

    Attributes:
        index: Over the pool's ``(P, D)`` vectors.
    """

    index: SearchIndex

    def near(self, asked: Vectors, number: int) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
        """Returns rows ``(Q, min(N, P))``, nearest first and -1 where none was found, and their similarities.

        A similarity is the cosine, the inner product, or the squared L2 distance with a minus.

        Args:
            asked: ``(Q, D)`` prepared vectors.
            number: N.
        """
        rows, values = self.index.search(asked, number)
        return rows, -values if self.index.facts.metric == "l2" else values

    def alike(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.floating]:
        """Returns ``(Q, N)`` similarities of rows ``(Q,)`` of the pool and others ``(Q, N)``."""
        out = np.empty(others.shape, np.float64)
        step = max(1, _NUMBERS // (others.shape[1] * self.index.facts.width))
        for start in range(0, len(rows), step):
            own = slice(start, start + step)
            one, many = self.index.vectors[rows[own]], self.index.vectors[others[own]]
            if self.index.facts.metric == "l2":
                many = many - one[:, None]
                out[own] = -np.einsum("qnd,qnd->qn", many, many, dtype=np.float64)
            else:
                out[own] = np.einsum("qd,qnd->qn", one, many, dtype=np.float64)
        return out


def search_rows(vectors: Vectors, *, kind: Kind, metric: Metric, seed: int) -> RowSearch:
    """Returns a search over rows ``(P, D)``; see ``index.search_among``."""
    return RowSearch(search_among(vectors, kind=kind, metric=metric, seed=seed))
