"""A limit keeps a subset that does not hang on the order of the rows."""

from hypothesis import given
from hypothesis import strategies as st

from mmtune.choice import chosen


@given(st.lists(st.text(), unique=True, max_size=30), st.integers(0, 40), st.randoms())
def test_a_smaller_limit_keeps_a_subset_whatever_the_order(ids, limit, random):
    kept = [ids[at] for at in chosen(ids, limit)]
    assert len(kept) == min(limit, len(ids))
    assert {ids[at] for at in chosen(ids, limit // 2)} <= set(kept)
    shuffled = random.sample(ids, len(ids))
    assert {shuffled[at] for at in chosen(shuffled, limit)} == set(kept)


def test_it_is_spread_over_the_rows():
    kept = chosen([f"row-{number}" for number in range(1000)], 100)
    assert kept == sorted(kept) and 20 < sum(number < 500 for number in kept) < 80
