"""Mixtures: rates by formula, whole numbers, which rows; exemplars that give nothing away."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.errors import RecipeError
from mmtune.prompts.exemplars import ExemplarPool, RandomExemplars
from mmtune.prompts.mixture import (
    Found,
    Shares,
    check_held_out,
    mixed,
    quotas,
    source_clusters,
    survey,
    task_rates,
    whole_parts,
)
from mmtune.records import Medium, Record, Reject

COUNTS = {"giant": 100_000, "middle": 3_000, "small": 50}


def row(at: int, source: str = "s", **fields) -> Record:
    return Record(f"{source}/{at}", source, "vqa", "train", text=f"q{at}", references=(f"a{at}",), **fields)


def rates(**options) -> dict:
    given = {"rate": "proportional", "cap": None, "temperature": 2.0, "replay": {}}
    return task_rates(COUNTS, **{**given, **options})


def test_examples_proportional_mixing_with_a_cap_is_exact():
    found = rates(cap=3_000)
    total = 3_000 + 3_000 + 50
    assert found == {
        "giant": Fraction(3_000, total),
        "middle": Fraction(3_000, total),
        "small": Fraction(50, total),
    }
    assert rates()["small"] == Fraction(50, 103_050)


def test_roots_are_those_of_the_capped_counts():
    capped = [min(count, 3_000) for count in COUNTS.values()]
    for options, power in (({"rate": "square_root"}, 0.5), ({"rate": "temperature", "temperature": 3.0}, 1 / 3)):
        wanted = np.array([count**power for count in capped])
        assert list(rates(cap=3_000, **options).values()) == pytest.approx(list(wanted / wanted.sum()), rel=1e-12)
    assert rates(rate="temperature", temperature=1.0) == rates()


def test_replay_has_its_share_and_the_others_share_the_rest():
    found = rates(cap=3_000, replay={"small": 0.2})
    assert found == {"giant": Fraction(2, 5), "middle": Fraction(2, 5), "small": Fraction(1, 5)}
    assert sum(found.values()) == 1


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.integers(1, 10**5))
def test_whole_parts_sum_and_are_off_by_less_than_one(counts: list[int], total: int):
    parts = {str(at): Fraction(count, sum(counts)) for at, count in enumerate(counts)}
    found = whole_parts(parts, total)
    assert sum(found.values()) == total
    assert all(abs(found[name] - part * total) < 1 for name, part in parts.items())


@pytest.mark.parametrize("rows", [1, 7, 50, 99, 230])
def test_a_quota_is_met_exactly_and_repeats_have_ids_of_their_own(rows: int):
    items = [row(at) for at in range(50)]
    quota = quotas({"s": survey(items)}, {"s": "c"}, {"s": Fraction(1)}, rows)["s"]
    taken = list(mixed([Reject("f:1", "", "bad"), *items], quota))
    ids = [item.id for item in taken if isinstance(item, Record)]
    assert isinstance(taken[0], Reject)
    assert len(ids) == rows == len(set(ids))
    times = [sum(one.partition("~")[0] == item.id for one in ids) for item in items]
    assert set(times) <= {rows // 50, rows // 50 + 1}
    assert quota.facts()["repeated"] == max(rows - 50, 0)
    # The order of the file decides nothing.
    assert {item.id for item in mixed(items[::-1], quota) if isinstance(item, Record)} == set(ids)


def test_a_smaller_mixture_is_a_subset():
    items = [row(at) for at in range(200)]
    kept = []
    for rows in (20, 60):
        quota = quotas({"s": survey(items)}, {"s": "c"}, {"s": Fraction(1)}, rows)["s"]
        kept.append({item.id for item in mixed(items, quota)})
    assert kept[0] < kept[1]


def test_draws_are_within_three_sigma_of_their_shares():
    shares = Shares({2: 0.2, 4: 0.1}, rationale=0.3, options=0.6, inverted=0.25)
    n = 20_000
    drawn = [shares.draw(f"s/{at}", 7) for at in range(n)]

    def near(count: int, share: float) -> bool:
        return abs(count - share * n) <= 3 * math.sqrt(n * share * (1 - share))

    assert near(sum(number == 2 for _, number in drawn), 0.2)
    assert near(sum(number == 4 for _, number in drawn), 0.1)
    assert near(sum(number == 0 for _, number in drawn), 0.7)
    assert near(sum(style.inverted for style, _ in drawn), 0.25)
    assert near(sum(bool(style.options) for style, _ in drawn), 0.6)
    # A row that is asked the other way round has no rationale.
    assert near(sum(style.rationale for style, _ in drawn), 0.3 * 0.75)
    assert drawn == [shares.draw(f"s/{at}", 7) for at in range(n)]
    assert drawn != [shares.draw(f"s/{at}", 8) for at in range(n)]


def test_clusters():
    assert source_clusters(["a", "b", "c"], {"nli": ["a", "b"]}) == {"a": "nli", "b": "nli", "c": "c"}
    with pytest.raises(RecipeError, match="unknown source") as error:
        source_clusters(["apple"], {"nli": ["appel"]})
    assert "did you mean 'apple'" in error.value.hint
    with pytest.raises(RecipeError, match="two clusters"):
        source_clusters(["a"], {"x": ["a"], "y": ["a"]})
    check_held_out(["nli"], {"a": "nli"})
    with pytest.raises(RecipeError, match="unknown cluster") as error:
        check_held_out(["nil"], {"a": "nli"})
    assert "did you mean 'nli'" in error.value.hint and error.value.exit_code == 2


def pool_of(items: list[Record], size: int = 512, seed: int = 0) -> tuple[Record, ...]:
    pool = ExemplarPool(seed, size)
    for item in items:
        pool.see(item)
    return pool.rows()


def test_a_pool_is_bounded_and_does_not_depend_on_the_order():
    items = [row(at) for at in range(300)]
    found = pool_of(items, 40)
    assert len(found) == 40 and found == pool_of(items[::-1], 40) != pool_of(items, 40, seed=1)
    assert {one.id for one in pool_of(items, 20)} < {one.id for one in found}
    nothing = [replace(row(0), references=()), replace(row(1), messages=("m",))]
    assert pool_of(nothing) == ()


@given(st.integers(0, 59), st.integers(1, 6), st.integers(0, 5))
def test_exemplars_are_never_the_row_nor_its_medium(at: int, number: int, seed: int):
    items = [row(n, media=(Medium("image", f"{n % 6}.jpg"),)) for n in range(60)]
    items += [row(n, source="other") for n in range(60, 80)]
    choose = RandomExemplars({"s": pool_of(items[:60]), "other": pool_of(items[60:])}, seed)
    found = choose(items[at], number)
    assert len(found) == number == len({one.id for one in found})
    assert all(one.source == "s" and one.media != items[at].media for one in found)
    assert found == choose(items[at], number)
    text = items[60 + at % 20]
    assert text.id not in {one.id for one in choose(text, 30)} and len(choose(text, 30)) == 19
    again = replace(text, id="other/copy")
    assert text.id not in {one.id for one in choose(again, 30)}
    assert choose(replace(text, source="held out"), 3) == []


def test_a_survey_counts_rationales():
    found = survey([row(0), replace(row(1), rationale="because"), Reject("f:1", "", "bad")])
    assert isinstance(found, Found) and (found.rows, found.rationales) == (2, 1)
