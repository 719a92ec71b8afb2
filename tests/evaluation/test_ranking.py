"""Option ranking: the formula, calibration, and a table of probabilities as the model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.evaluation.ranking import calibrated, label_scores, rank
from mmtune.records import Example, Medium, Message, SoftPart, TextPart, marked

logs = st.floats(-30, 0)


@given(st.lists(st.tuples(logs, st.integers(0, 2)), min_size=3, max_size=12))
def test_a_label_has_the_summed_probability_of_its_words(words: list[tuple[float, int]]):
    owners = [0, 1, 2, *(owner for _, owner in words[3:])]
    values = np.array([value for value, _ in words])
    wanted = [
        sum(np.exp(value) for value, owner in zip(values, owners, strict=True) if owner == label) for label in range(3)
    ]
    assert np.exp(label_scores(values, owners)) == pytest.approx(wanted)


@given(st.lists(logs, min_size=2, max_size=6))
def test_the_content_free_input_becomes_exactly_uniform(scores: list[float]):
    free = np.array(scores)
    found = calibrated(free, free)
    assert np.all(found == found[0]) and np.exp(found).sum() == pytest.approx(1)


def example(name: str, prompt: str, options=("bad", "good"), **metadata) -> Example:
    asked = Message("user", (Medium("image", "a.jpg"), TextPart(prompt)))
    answer = Message("assistant", (TextPart("good"),))
    return Example(name, "s", "t", "val", (asked, answer), ("good",), "accuracy", options, metadata=metadata)


def model(table: dict[tuple[str, str], float], calls: list | None = None):
    def score(asked):
        if calls is not None:
            calls.extend(asked)
        return np.log([table[question.turns[-1].text, question.words[word]] for question, word in asked])

    return score


def test_the_likeliest_option_wins_by_all_its_words():
    table = {("p", "bad"): 0.3, ("p", "good"): 0.25, ("p", "fine"): 0.25}
    asked = {0: example("0", "p"), 1: example("1", "p", options=())}
    assert rank(asked, {}, model(table)) == {0: "bad"}
    words = {"s": {"good": ("good", "fine"), "bad": ("bad",)}}
    assert rank(asked, words, model(table)) == {0: "good"}


def test_calibration_takes_away_what_the_template_prefers():
    table = {("p", "bad"): 0.6, ("p", "good"): 0.3, ("free", "bad"): 0.9, ("free", "good"): 0.1}
    calls: list = []
    asked = {at: example(str(at), "p", content_free="free") for at in range(5)}
    assert rank(asked, {}, model(table, calls)) == dict.fromkeys(range(5), "good")
    # The content-free prompt is asked once for all rows of its template, without a medium.
    assert len(calls) == 5 * 2 + 2
    assert not calls[-1][0].turns[-1].media
    assert rank({0: example("0", "p")}, {}, model(table)) == {0: "bad"}


def test_options_that_begin_alike_are_told_apart():
    table = {("p", "New York"): 0.1, ("p", "New Delhi"): 0.2}
    calls: list = []
    assert rank({3: example("3", "p", ("New York", "New Delhi"))}, {}, model(table, calls)) == {3: "New Delhi"}
    question, word = calls[1]
    assert question.conversation(word)[-1].text == "New Delhi"


def test_calibration_keeps_the_soft_tokens_of_the_template():
    asked = example("0", "p", content_free=marked((SoftPart(2), TextPart("free"))))
    calls: list = []

    def score(pairs):
        calls.extend(pairs)
        return np.zeros(len(pairs))

    rank({0: asked}, {}, score)
    assert calls[-1][0].turns[-1].parts == (SoftPart(2), TextPart("free"))
