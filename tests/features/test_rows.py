"""Rows as vectors: means of their units, kinds of equal weight; FAISS's flat search finds the same rows and values."""

from pathlib import Path

import numpy as np
import pytest

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.features.rows import open_row_features, search_rows
from mmtune.features.table import REDUCED, Row, open_features, record_batch, vector_column
from mmtune.features.units import Unit
from mmtune.storage import SplitWriter, finish_split


def write(folder: Path, kind: str, vectors: dict[str, list[float]]) -> None:
    rows = [Row(Unit(kind, name, ""), "", None, np.array(vector, np.float32)) for name, vector in vectors.items()]
    batch = record_batch(rows, {name: ["train"] for name in vectors}, None)
    writer = SplitWriter(folder / kind / "shard-00000.arrow", batch.schema)
    writer.write_batch(batch)
    writer.close()
    finish_split(folder / kind, batch.schema)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "image", {"a": [3, 0], "b": [0, 2], "c": [1, 1]})
    write(tmp_path, "text", {"t": [0, 0, 5], "u": [1, 0, 0]})
    (tmp_path / "rejects.jsonl").write_text('{"where": "", "id": "bad", "reason": "x", "detail": ""}\n')
    return tmp_path


def opened(folder: Path, kinds=(), metric="cosine", made=None, media_root="/m"):
    made = {"image": 3, "text": 2} if made is None else made
    return open_row_features(folder, kinds, made=made, metric=metric, made_of="/m", media_root=media_root)


def test_a_row_is_the_mean_of_its_units_and_every_kind_weighs_the_same(folder: Path):
    features = opened(folder)
    assert features.kinds == ("image", "text")
    rows = [
        [("image", "a"), ("image", "b"), ("text", "t")],
        [("image", "a")],
        [("image", "bad"), ("behaviour", "x")],
    ]
    vectors, has = features.vectors(rows, ["r0", "r1", "r2"])
    half = 0.5**0.5
    expected = np.array([[half * half, half * half, 0, 0, half], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert has.tolist() == [True, True, False]
    raw, _ = opened(folder, ("image",), "l2").vectors([[("image", "a"), ("image", "b")]], ["r"])
    np.testing.assert_allclose(raw, [[1.5, 1]])


def test_rows_are_compared_by_reduced_vectors_where_there_are_some(folder: Path):
    table = open_features(folder, "image").table.append_column(REDUCED, vector_column(np.array([[1.0], [2], [4]])))
    (folder / "image" / "data-00000-of-00001.arrow").unlink()
    writer = SplitWriter(folder / "image" / "data-00000-of-00001.arrow", table.schema)
    writer.write_batch(table.combine_chunks().to_batches()[0])
    writer.close()
    made, _ = opened(folder, ("image",), "l2").vectors([[("image", "a"), ("image", "c")]], ["r"])
    assert made.tolist() == [[2.5]]
    kept = open_features(folder, "image")
    assert kept.pooled().shape == (3, 2) and kept.not_reduced().compared().shape == (3, 2)


def test_features_that_do_not_fit_say_what_to_run(folder: Path):
    with pytest.raises(DataError, match="the image of 'row 1'") as stale:
        opened(folder).vectors([[], [("image", "new")]], ["row 0", "row 1"])
    with pytest.raises(RecipeError, match="asks for audio") as missing:
        opened(folder, ("audio",))
    with pytest.raises(IntegrityError, match="below /m") as elsewhere:
        opened(folder, media_root="/other")
    assert stale.value.code == "features_stale" and missing.value.code == "features_missing"
    assert all("mmtune extract" in error.value.hint for error in (stale, missing, elsewhere))


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_flat_search_finds_the_rows_and_values_of_a_float64_search(metric: str):
    pytest.importorskip("faiss")
    dice = np.random.default_rng(0)
    pool, asked = dice.normal(size=(500, 24)).astype(np.float32), dice.normal(size=(40, 24)).astype(np.float32)
    if metric == "cosine":
        pool, asked = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (pool, asked))
    wide, many = asked.astype(np.float64)[:, None], pool.astype(np.float64)[None]
    true = -((wide - many) ** 2).sum(-1) if metric == "l2" else (wide * many).sum(-1)
    rows = np.argsort(-true, axis=1, kind="stable")[:, :9]
    for kind in ("exact", "flat"):
        search = search_rows(pool, kind=kind, metric=metric, seed=0)
        found, values = search.near(asked, 9)
        np.testing.assert_array_equal(found, rows, err_msg=kind)
        np.testing.assert_allclose(values, np.take_along_axis(true, rows, 1), rtol=1e-4, atol=1e-5)
        own = search.alike(rows[:, 0], rows)
        first, others = pool[rows[:, 0]].astype(np.float64)[:, None], pool[rows].astype(np.float64)
        expected = -((first - others) ** 2).sum(-1) if metric == "l2" else (first * others).sum(-1)
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_searches_find_most_of_the_nearest(kind: str):
    pytest.importorskip("faiss")
    pool = np.random.default_rng(1).normal(size=(2000, 16)).astype(np.float32)
    exact, _ = search_rows(pool, kind="exact", metric="cosine", seed=0).near(pool[:100], 5)
    found, _ = search_rows(pool, kind=kind, metric="cosine", seed=0).near(pool[:100], 5)
    assert (found[:, :, None] == exact[:, None]).any(-1).mean() > 0.6
