"""The search index on disk: exact without FAISS; FAISS flat equal to it, HNSW and IVF by their recall."""

import json

import numpy as np
import pytest

from mmtune.errors import CapabilityError, DataError, IntegrityError
from mmtune.features.index import build_index, has_faiss, open_index
from mmtune.features.neighbours import nearest

FAISS = pytest.mark.skipif(not has_faiss(), reason="faiss-cpu is not installed (mmtune[retrieval])")
RNG = np.random.default_rng(0)
POOL = RNG.normal(size=(3000, 16)).astype(np.float32)
QUERIES = RNG.normal(size=(50, 16)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_an_exact_index_comes_back_from_its_folder(metric, tmp_path):
    facts = build_index(tmp_path / "index", POOL, kind="exact", metric=metric, source="abc")
    again = open_index(tmp_path / "index", source="abc")
    assert again.facts == facts and facts.recall == 1 and facts.count == 3000
    rows, values = again.search(QUERIES, 7)
    expected = nearest(POOL, QUERIES, 7, metric)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(values, expected[1])


@FAISS
@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_faiss_flat_finds_the_exact_rows_and_distances(metric, tmp_path):
    build_index(tmp_path, POOL, kind="flat", metric=metric, source="abc")
    rows, values = open_index(tmp_path).search(QUERIES, 7)
    expected = nearest(POOL, QUERIES, 7, metric)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(values, expected[1], rtol=1e-4, atol=1e-4)


@FAISS
@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.95), ("ivf", 0.6)])
def test_an_approximate_index_says_its_recall(kind, least, tmp_path):
    facts = build_index(tmp_path, POOL, kind=kind, metric="cosine", source="abc")
    index = open_index(tmp_path)
    rows, _ = index.search(POOL[:400], 10)
    exact, _ = nearest(POOL, POOL[:400], 10)
    true = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(rows, exact, strict=True)])
    assert facts.recall == index.facts.recall >= least
    assert abs(true - facts.recall) < 0.06


@FAISS
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_a_pool_smaller_than_k_gives_all_of_it(kind, tmp_path):
    build_index(tmp_path, POOL[:3], kind=kind, metric="l2", source="abc")
    rows, _ = open_index(tmp_path).search(QUERIES[:2], 10)
    assert sorted(rows[0]) == [0, 1, 2]


def test_a_stale_or_damaged_index_is_refused(tmp_path):
    build_index(tmp_path, POOL, kind="exact", metric="cosine", source="abc")
    with pytest.raises(IntegrityError, match="other features") as caught:
        open_index(tmp_path, source="def")
    assert caught.value.code == "stale_index"
    np.save(tmp_path / "vectors.npy", POOL[:-1])
    with pytest.raises(IntegrityError, match="2999"):
        open_index(tmp_path)
    (tmp_path / "vectors.npy").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match="damaged"):
        open_index(tmp_path)
    with pytest.raises(DataError, match="no search index"):
        open_index(tmp_path / "nothing")


def test_bad_vectors_and_queries_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 1"):
        build_index(tmp_path, np.array([[1.0, 0], [np.nan, 0]]), kind="exact", metric="l2", source="")
    with pytest.raises(DataError, match="no vectors"):
        build_index(tmp_path, np.empty((0, 4)), kind="exact", metric="l2", source="")
    build_index(tmp_path, POOL, kind="exact", metric="cosine", source="abc")
    with pytest.raises(DataError, match="16"):
        open_index(tmp_path).search(QUERIES[:, :5], 3)


def test_without_faiss_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtune.features.index.has_faiss", lambda: False)
    with pytest.raises(CapabilityError, match="FAISS") as caught:
        build_index(tmp_path, POOL, kind="hnsw", metric="cosine", source="abc")
    assert "mmtune[retrieval]" in caught.value.hint
    build_index(tmp_path, POOL, kind="exact", metric="cosine", source="abc")
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**facts, "kind": "ivf"}))
    with pytest.raises(CapabilityError):
        open_index(tmp_path)
