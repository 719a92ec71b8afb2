"""The search index of a features folder: exact by NumPy, or FAISS (the extra ``retrieval``).

``index/<modality>/`` holds ``vectors.npy`` (the pooled vectors as they are compared), ``index.json`` (what it is and of
what it was made) and, for FAISS, ``index.faiss``. It is small and opens without reading the vectors.

Shapes: P pool, Q queries, D width, K neighbours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import CapabilityError, DataError, IntegrityError
from mmtune.features.neighbours import Metric, Vectors, check_widths, prepared, search_prepared
from mmtune.files import write_json

Kind = Literal["exact", "flat", "hnsw", "ivf"]
_LINKS, _BUILD_REACH, _SEARCH_REACH = 32, 200, 128
"""HNSW (Malkov and Yashunin, arXiv:1603.09320): links of a vector, and candidates while building and searching."""
_PROBES = 16
"""IVF: lists that a query looks into, of about sqrt(P) in all times two."""
_TRAIN_PER_LIST = 64
_ASKED = 256
"""Vectors of the pool that recall is measured with."""


@dataclass(frozen=True)
class IndexFacts:
    """What an index is.

    Attributes:
        kind: ``exact``, ``flat``, ``hnsw`` or ``ivf``.
        metric: ``cosine``, ``inner_product`` or ``l2``.
        count: Vectors, P.
        width: D.
        source: Fingerprint of what made the vectors.
        digest: sha256 of the vectors' bytes.
        recall: Share of the exact nearest that it finds, among the first ``recall_at``.
        recall_at: K of the recall.
    """

    kind: Kind
    metric: Metric
    count: int
    width: int
    source: str
    digest: str
    recall: float = 1.0
    recall_at: int = 10


class SearchIndex:
    """An opened index; see ``open_index``.

    Attributes:
        facts: What it is.
        vectors: ``(P, D)`` as they are compared, read on use.
    """

    def __init__(self, facts: IndexFacts, vectors: Vectors, faiss_index: Any = None) -> None:
        self.facts, self.vectors, self._faiss = facts, vectors, faiss_index

    def search(self, queries: NDArray[np.floating], k: int) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
        """Returns rows and values ``(Q, min(k, P))`` of the nearest, nearest first; see ``neighbours.nearest``.

        Where an approximate index finds fewer, the row is -1.

        Raises:
            DataError: Queries have another width, or hold no finite numbers.
        """
        asked = prepared(queries, self.facts.metric, "queries")
        check_widths(self.facts.width, asked.shape[1])
        if self._faiss is None:
            return search_prepared(self.vectors, asked, k, self.facts.metric)
        values, rows = self._faiss.search(asked, min(k, self.facts.count))
        return rows, values


def build_index(
    folder: Path, vectors: NDArray[np.floating], *, kind: Kind, metric: Metric, source: str, seed: int = 0
) -> IndexFacts:
    """Writes an index of vectors ``(P, D)`` and returns what it is.

    Args:
        folder: Where it goes; made when it is not there.
        vectors: The pool, one row each.
        kind: ``exact`` needs nothing; ``flat`` is FAISS's exact search, ``hnsw`` and ``ivf`` are approximate.
        metric: How vectors are compared.
        source: Fingerprint of what made the vectors; the index is refused where another is expected.
        seed: Of the lists of ``ivf`` and of the vectors that recall is measured with.

    Raises:
        CapabilityError: FAISS is not installed.
        DataError: A vector holds no finite numbers, or there are none.
    """
    pool = prepared(vectors, metric, "the pooled vectors")
    if not len(pool):
        raise DataError("there are no vectors to search among", "look at rejects.jsonl", "no_vectors")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", pool)
    digest = hashlib.sha256(pool.tobytes()).hexdigest()
    facts = IndexFacts(kind, metric, len(pool), pool.shape[1], source, digest)
    if kind != "exact":
        faiss = _faiss()
        made = _make(faiss, pool, kind, metric, seed)
        faiss.write_index(made, str(folder / "index.faiss"))
        facts = _with_recall(SearchIndex(facts, pool, made), seed)
    write_json(folder / "index.json", asdict(facts))
    return facts


def search_among(vectors: NDArray[np.floating], *, kind: Kind, metric: Metric, seed: int = 0) -> SearchIndex:
    """Returns an index over vectors ``(P, D)`` in memory; see ``build_index``.

    Raises:
        CapabilityError: FAISS is not installed.
        DataError: A vector holds no finite numbers.
    """
    pool = prepared(vectors, metric, "the vectors")
    facts = IndexFacts(kind, metric, len(pool), pool.shape[1], "", "")
    return SearchIndex(facts, pool, None if kind == "exact" else _make(_faiss(), pool, kind, metric, seed))


def open_index(folder: Path, *, source: str | None = None) -> SearchIndex:
    """Returns an index from its folder.

    Args:
        folder: As ``build_index`` wrote it.
        source: The fingerprint that it must have been made from; None takes any.

    Raises:
        CapabilityError: It needs FAISS, which is not installed.
        DataError: There is none.
        IntegrityError: It is damaged, or made from other features (``stale_index``).
    """
    file = folder / "index.json"
    if not file.is_file():
        raise DataError(f"{folder} holds no search index", "run: mmtune extract", "index_missing")
    try:
        facts = IndexFacts(**json.loads(file.read_text("utf-8")))
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"the search index in {folder} is damaged", "run: mmtune extract --force") from error
    if source is not None and source != facts.source:
        raise IntegrityError(
            f"the search index in {folder} was made from other features ({facts.source[:12]}, not {source[:12]})",
            "run: mmtune extract",
            "stale_index",
        )
    if vectors.shape != (facts.count, facts.width):
        raise IntegrityError(
            f"{folder} holds vectors of shape {vectors.shape}, its index is of {(facts.count, facts.width)}",
            "run: mmtune extract --force",
            "stale_index",
        )
    if facts.kind == "exact":
        return SearchIndex(facts, vectors)
    faiss = _faiss()
    try:
        found = faiss.read_index(str(folder / "index.faiss"))
    except RuntimeError as error:
        raise IntegrityError(f"{folder}/index.faiss is damaged", "run: mmtune extract --force") from error
    if (found.ntotal, found.d) != (facts.count, facts.width):
        raise IntegrityError(f"{folder}/index.faiss is of other vectors", "run: mmtune extract --force", "stale_index")
    return SearchIndex(facts, vectors, found)


def has_faiss() -> bool:
    """Says whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    if not has_faiss():
        raise CapabilityError(
            "this search index needs FAISS, which is not installed",
            'pip install "mmtune[retrieval]", or set extract.index.kind: exact',
            "missing_extra",
        )
    import faiss

    return faiss


def _make(faiss: Any, pool: Vectors, kind: Kind, metric: Metric, seed: int) -> Any:
    compared = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    count, width = pool.shape
    if kind == "flat":
        made = faiss.IndexFlat(width, compared)
    elif kind == "hnsw":
        made = faiss.IndexHNSWFlat(width, _LINKS, compared)
        made.hnsw.efConstruction, made.hnsw.efSearch = _BUILD_REACH, _SEARCH_REACH
    else:
        lists = max(1, min(round(2 * count**0.5), count))
        made = faiss.IndexIVFFlat(faiss.IndexFlat(width, compared), width, lists, compared)
        made.cp.seed, made.cp.min_points_per_centroid = seed + 1, 1
        made.nprobe = min(_PROBES, lists)
        rng = np.random.default_rng(seed)
        made.train(pool[np.sort(rng.permutation(count)[: lists * _TRAIN_PER_LIST])])
    made.add(pool)
    return made


def _with_recall(index: SearchIndex, seed: int) -> IndexFacts:
    facts = index.facts
    rows = np.random.default_rng(seed).permutation(facts.count)[:_ASKED]
    k = min(facts.recall_at, facts.count)
    asked = np.ascontiguousarray(index.vectors[np.sort(rows)])
    _, values = search_prepared(index.vectors, asked, k, facts.metric)
    found, _ = index.search(asked, k)
    return IndexFacts(**{**asdict(facts), "recall": recall(index.vectors, asked, found, values, facts.metric)})


def recall(
    pool: Vectors, queries: Vectors, found: NDArray[np.int64], exact: NDArray[np.float64], metric: Metric
) -> float:
    """Returns the share of found rows that are at least as near as the exact K-th: a tie counts as found.

    Args:
        pool: ``(P, D)``, prepared.
        queries: ``(Q, D)``, prepared.
        found: Rows ``(Q, K)``, -1 where none was found.
        exact: Values ``(Q, K)`` of the true nearest.
        metric: How vectors are compared.
    """
    near = pool[np.maximum(found, 0)].astype(np.float64)
    own = queries[:, None].astype(np.float64)
    values = -((near - own) ** 2).sum(-1) if metric == "l2" else (near * own).sum(-1)
    bar = -exact[:, -1:] if metric == "l2" else exact[:, -1:]
    hits = (found >= 0) & (values >= bar - 1e-6 * np.maximum(np.abs(bar), 1))
    return float(hits.mean())
