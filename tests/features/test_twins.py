"""Near twins: equal to a search by hand, and nothing found where there is nothing to compare."""

import numpy as np
import pyarrow as pa
import pytest

from mmtune.errors import DataError
from mmtune.features.table import FeatureTable, vector_column
from mmtune.features.twins import near_twins


def table(vectors: np.ndarray, splits: list[list[str]]) -> FeatureTable:
    ids = [f"{row}.png" for row in range(len(splits))]
    return FeatureTable(pa.table({"id": ids, "splits": splits, "pooled": vector_column(vectors)}))


@pytest.mark.parametrize("seed", range(20))
def test_twins_are_those_that_a_search_by_hand_finds(seed: int):
    dice = np.random.default_rng(seed)
    least = dice.uniform(0.5, 1)
    vectors = dice.normal(size=(40, 3)).astype(np.float32)
    places = [["train"], ["val"], ["test"], ["train", "test"], ["val", "test"]]
    splits = [places[at] for at in dice.integers(0, len(places), 40)]
    found = near_twins(table(vectors, splits), least)
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    trained = [row for row in range(40) if "train" in splits[row]]
    held = [row for row in range(40) if "train" not in splits[row]]
    wanted = {}
    for row in held:
        cosines = exact[trained] @ exact[row]
        if cosines.max() >= least:
            wanted[f"{row}.png"] = (f"{trained[int(cosines.argmax())]}.png", cosines.max())
    assert {twin.id: twin.train for twin in found.found} == {own: train for own, (train, _) in wanted.items()}
    assert [twin.cosine for twin in found.found] == sorted((twin.cosine for twin in found.found), reverse=True)
    for twin in found.found:
        assert twin.cosine == pytest.approx(wanted[twin.id][1], abs=1e-6)
        assert list(twin.splits) == splits[int(twin.id.partition(".")[0])]
    counts = {
        split: {
            "units": sum(split in splits[row] for row in held),
            "twins": sum(split in splits[row] for row in held if f"{row}.png" in wanted),
        }
        for split in ("test", "val")
    }
    assert found.facts()["splits"] == {split: one for split, one in counts.items() if one["units"]}


def test_a_copy_is_a_twin_at_any_bound_and_a_vector_of_zeros_is_none():
    dice = np.random.default_rng(0)
    vectors = dice.normal(size=(50, 96)).astype(np.float32)
    vectors[25:] = vectors[:25] * dice.uniform(0.1, 9, (25, 1)).astype(np.float32)
    vectors[[24, 49]] = 0
    found = near_twins(table(vectors, [["train"]] * 25 + [["val"]] * 25), 1.0)
    assert {twin.id: twin.train for twin in found.found} == {f"{25 + at}.png": f"{at}.png" for at in range(24)}


@pytest.mark.parametrize("splits", [[["train"]] * 4, [["val"]] * 4, [["train", "val"]] * 4, []])
def test_without_held_out_units_or_training_units_there_is_nothing_to_compare(splits: list[list[str]]):
    found = near_twins(table(np.ones((len(splits), 2), np.float32), splits), 0.5)
    assert found.found == () and found.median is None and found.facts()["median_cosine"] is None


def test_a_vector_without_finite_numbers_is_refused():
    vectors = np.ones((2, 2), np.float32)
    vectors[1, 0] = np.nan
    with pytest.raises(DataError, match="no finite numbers"):
        near_twins(table(vectors, [["train"], ["val"]]), 0.5)
