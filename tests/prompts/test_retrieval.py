"""Which near rows are shown: equal to an exhaustive search, never the row itself, one of its media or its text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.features.neighbours import nearest
from mmtune.prompts import retrieval
from mmtune.prompts.exemplars import in_turns, shown_ranks
from mmtune.prompts.retrieval import Card, Numbers, Wanted, majority, pick


def exhaustive(asked: Card, pool: list[Card], similarity: np.ndarray, own: np.ndarray, wanted: Wanted) -> list[int]:
    """Picks by looking at every row of the pool, one turn after the other, as the paper and the docstring say."""
    left = [
        at
        for at, card in enumerate(pool)
        if card.id != asked.id
        and not set(card.media) & set(asked.media)
        and not (card.text and card.text == asked.text)
    ]
    left.sort(key=lambda at: (-similarity[at], at))
    out: list[int] = []
    while left and len(out) < wanted.k:
        fit = left
        if wanted.balance:
            used = {label: sum(pool[at].label == label for at in out) for label in {pool[at].label for at in left}}
            fit = [at for at in left if used[pool[at].label] == min(used.values())]
        if wanted.diversity:
            fit = fit[: retrieval.MMR_CANDIDATES]
            worth = {
                at: (1 - wanted.diversity) * similarity[at]
                - (wanted.diversity * max(own[at, other] for other in out) if out else 0)
                for at in fit
            }
            best = max(fit, key=lambda at: (worth[at], -fit.index(at)))
        else:
            best = fit[0]
        out.append(best)
        left.remove(best)
    return out


@st.composite
def problems(draw):
    count, asked = draw(st.integers(0, 70)), draw(st.integers(1, 5))
    dice = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.sampled_from(["text", "media", "both"]))

    def card(at: int) -> Card:
        some = kinds == "media" or (kinds == "both" and dice.random() < 0.5)
        media = tuple(sorted({f"m{dice.integers(12)}" for _ in range(dice.integers(1, 4))})) if some else ()
        # A history of items alone has neither media nor a text.
        text = "" if media or dice.random() < 0.2 else f"t{dice.integers(20)}"
        return Card(f"r{at}", "s", media, text, f"l{dice.integers(draw_labels)}")

    draw_labels = draw(st.integers(1, 6))
    pool = [card(at) for at in range(count)]
    # Whole numbers: many equal similarities.
    vectors = dice.integers(-2, 3, (count, 3)).astype(np.float32)
    own = [int(dice.integers(count)) for _ in range(asked)] if count else []
    questions = [pool[at] for at in own] + [card(count + at) for at in range(asked)]
    queries = np.concatenate([vectors[own], dice.integers(-2, 3, (asked, 3))]).astype(np.float32)
    wanted = Wanted(draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])), draw(st.booleans()))
    return pool, vectors, questions, queries, wanted


def picked(pool, vectors, questions, queries, wanted) -> list[list[int]]:
    numbers = Numbers()
    cards, asked = numbers.of(pool), numbers.of(questions)

    def near(rows, number):
        return nearest(vectors, queries[rows], number, "inner_product")

    def alike(rows, others):
        return np.einsum("qd,qnd->qn", vectors[rows], vectors[others], dtype=np.float64)

    found = pick(asked, cards, near, alike, wanted)
    return [[int(at) for at in row if at >= 0] for row in found]


@settings(max_examples=300, deadline=None)
@given(problems())
def test_picks_are_those_of_an_exhaustive_search(problem):
    pool, vectors, questions, queries, wanted = problem
    own = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    for question, query, found in zip(questions, queries, picked(*problem), strict=True):
        similarity = vectors.astype(np.float64) @ query
        expected = exhaustive(question, pool, similarity, own, wanted)
        if wanted.diversity:
            # Scores of MMR may tie up to rounding; each pick must be as good as the best.
            assert len(found) == len(expected)
            assert _same_worth(found, expected, similarity, own, wanted.diversity)
        else:
            assert found == expected


def _same_worth(found, expected, similarity, own, diversity) -> bool:
    for turn, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one == other:
            continue
        before = expected[:turn]
        worth = [
            (1 - diversity) * similarity[at] - diversity * max((own[at, seen] for seen in before), default=0)
            for at in (one, other)
        ]
        return abs(worth[0] - worth[1]) < 1e-9
    return True


@settings(max_examples=200, deadline=None)
@given(problems())
def test_never_the_row_itself_its_media_or_its_text_and_k_is_kept(problem):
    pool, _, questions, _, wanted = problem
    for question, found in zip(questions, picked(*problem), strict=True):
        free = [
            card
            for card in pool
            if card.id != question.id
            and not set(card.media) & set(question.media)
            and (not card.text or card.text != question.text)
        ]
        assert len(set(found)) == len(found) == min(wanted.k, len(free))
        assert all(pool[at] in free for at in found)
        if wanted.balance and found:
            shown = [pool[at].label for at in found]
            have = {label: sum(card.label == label for card in free) for label in {card.label for card in free}}
            for label, there in have.items():
                # A label falls behind another one by more than one turn only when it has no rows left.
                assert shown.count(label) == there or shown.count(label) >= max(map(shown.count, shown)) - 1


def test_an_index_that_finds_too_little_is_asked_for_more():
    pool = [Card(f"r{at}", "s", ("same",) if at < 40 else (f"m{at}",)) for at in range(60)]
    vectors = np.linspace(1, 0, 60, dtype=np.float32)[:, None]
    asked = []

    def near(rows, number):
        asked.append(number)
        found, values = nearest(vectors, np.ones((len(rows), 1), np.float32), number, "inner_product")
        found[:, 1::2] = -1
        return found, values

    numbers = Numbers()
    cards = numbers.of(pool)
    found = pick(numbers.of([Card("q", "s", ("same",))]), cards, near, lambda rows, others: others * 0.0, Wanted(3))
    assert found.tolist() == [[40, 42, 44]] and len(asked) > 1


def test_diversity_takes_another_kind_where_the_nearest_take_copies():
    vectors = np.array([[1, 0], [1, 0.01], [1, 0.02], [0.7, 0.7]], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pool, question = [Card(f"r{at}", "s", text=f"t{at}") for at in range(4)], [Card("q", "s", text="q")]
    query = np.array([[1, 0.0]], np.float32)
    assert picked(pool, vectors, question, query, Wanted(2)) == [[0, 1]]
    assert picked(pool, vectors, question, query, Wanted(2, diversity=0.7)) == [[0, 3]]


def test_an_empty_pool_gives_nothing():
    assert picked([], np.empty((0, 2), np.float32), [Card("q", "s")], np.ones((1, 2), np.float32), Wanted(2)) == [[]]


@pytest.mark.parametrize(
    ("labels", "expected"), [("aab", "a"), ("abb", "b"), ("ba", "b"), ("", "")], ids=["two", "later", "tie", "none"]
)
def test_the_majority_answers_and_a_tie_goes_to_the_nearest(labels: str, expected: str):
    assert majority(labels) == expected


def test_how_they_stand():
    assert shown_ranks("nearest_first", 3, "x") == [0, 1, 2] and shown_ranks("nearest_last", 3, "x") == [2, 1, 0]
    orders = {tuple(shown_ranks("random", 4, f"{at}")) for at in range(50)}
    assert len(orders) > 10 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert shown_ranks("random", 4, "7") == shown_ranks("random", 4, "7")


def test_labels_take_turns():
    assert in_turns(["a1", "a2", "a3", "b1", "c1"], 5, lambda row: row[0]) == ["a1", "b1", "c1", "a2", "a3"]
    assert in_turns([], 2, str) == []


def test_balance_over_a_large_pool_looks_at_a_few_rows_only():
    pool = [Card(f"r{at}", "s", text=f"t{at}", label="ab"[at % 2]) for at in range(500)]
    vectors = np.linspace(1, 0, 500, dtype=np.float32)[:, None]
    asked = []

    def near(rows, number):
        asked.append(number)
        return nearest(vectors, np.ones((len(rows), 1), np.float32), number, "inner_product")

    numbers = Numbers()
    found = pick(
        numbers.of([Card("q", "s")]), numbers.of(pool), near, lambda rows, others: others * 0.0, Wanted(4, balance=True)
    )
    assert found.tolist() == [[0, 1, 2, 3]] and asked == [12]
