"""A limit keeps a subset that does not hang on the order of the rows, nor on what an earlier limit kept."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.choice import chosen, id_hash, in_shares
from mmtune.evaluation.rows import ChosenExamples


@given(st.lists(st.text(), unique=True, max_size=30), st.integers(0, 40), st.randoms())
def test_a_smaller_limit_keeps_a_subset_whatever_the_order(ids, limit, random):
    kept = [ids[at] for at in chosen(ids, limit, "source")]
    assert len(kept) == min(limit, len(ids))
    assert {ids[at] for at in chosen(ids, limit // 2, "source")} <= set(kept)
    shuffled = random.sample(ids, len(ids))
    assert {shuffled[at] for at in chosen(shuffled, limit, "source")} == set(kept)


def test_it_is_spread_over_the_rows():
    kept = chosen([f"row-{number}" for number in range(1000)], 100, "source")
    assert kept == sorted(kept) and 20 < sum(number < 500 for number in kept) < 80


def cut_and_whole() -> list[str]:
    """Ids of a source of 5,000 rows that its own limit cut to 300, and of a whole one of 300."""
    many = [f"cut:{number}" for number in range(5000)]
    return [many[at] for at in chosen(many, 300, "source")] + [f"whole:{number}" for number in range(300)]


@pytest.mark.parametrize("purpose", ["eval.limit", "tokenize.limit", "eval_rows"])
def test_a_limit_after_that_of_a_source_is_a_sample_of_all_sources(purpose):
    ids = cut_and_whole()
    assert 35 < sum(at < 300 for at in chosen(ids, 100, purpose)) < 65


def test_eval_asks_rows_of_all_sources():
    ids = cut_and_whole()
    asked = ChosenExamples(pa.table({"id": ids}).to_batches(), lambda row: row["id"], 100)
    assert 35 < sum(asked(at).startswith("cut") for at in range(len(asked))) < 65


def test_the_rows_of_a_source_are_those_that_they_ever_were():
    # What recipes with a limit or a mixture report was measured on them.
    assert id_hash("vqa:7", "source") == 955152428526127016


@given(st.lists(st.tuples(st.integers(), st.sampled_from("abc")), unique=True, max_size=40), st.randoms())
def test_every_beginning_has_each_source_at_its_share(rows, random):
    rows = [(f"{source}:{number}", source) for number, source in rows]
    order = [rows[at] for at in in_shares([name for name, _ in rows], [source for _, source in rows])]
    assert sorted(order) == sorted(rows)
    for count in range(len(rows) + 1):
        for source in "abc":
            share = sum(own == source for _, own in rows) / max(len(rows), 1)
            assert abs(sum(own == source for _, own in order[:count]) - share * count) < 1.5
    mixed = random.sample(rows, len(rows))
    assert order == [mixed[at] for at in in_shares([name for name, _ in mixed], [source for _, source in mixed])]


def test_rows_of_one_source_stand_by_their_hashes():
    ids = [f"row-{number}" for number in range(50)]
    assert sorted(in_shares(ids, ["a"] * 50)[:20]) == chosen(ids, 20, "source")
