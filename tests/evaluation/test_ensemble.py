"""Several prompts that answer together, by hand."""

import numpy as np
import pytest

from mmtune.evaluation.ensemble import majority_of, mean_shares, together

A = {0: np.log([0.6, 0.4]), 1: np.log([0.9, 0.1])}
B = {0: np.log([0.1, 0.9]), 1: np.log([0.2, 0.8])}
OPTIONS = (("no", "yes"), ("cat", "dog"), ())


def test_the_probabilities_are_averaged_and_not_the_answers():
    found = mean_shares([A, B])
    assert np.exp(found[0]) == pytest.approx([0.35, 0.65]) and np.exp(found[1]) == pytest.approx([0.55, 0.45])
    said = [["no", "cat", "two"], ["yes", "dog", "one"]]
    assert together(said, [A, B], OPTIONS) == ["yes", "cat", "two"]


def test_one_member_is_that_member_and_two_copies_are_one():
    for members in ([A], [A, A]):
        found = mean_shares(members)
        for row, own in A.items():
            np.testing.assert_allclose(found[row], own, atol=1e-12)
    assert mean_shares([A])[0].tolist() == A[0].tolist()
    assert together([["no", "cat", "two"]], [A], OPTIONS) == ["no", "cat", "two"]


def test_a_row_that_a_member_did_not_rank_has_the_mean_of_the_others():
    found = mean_shares([A, {1: B[1]}])
    np.testing.assert_array_equal(found[0], A[0])
    assert np.exp(found[1]) == pytest.approx([0.55, 0.45]) and not mean_shares([{}, {}])


def test_words_of_their_own_are_counted_and_the_first_of_equals_wins():
    assert majority_of(["two", "one", "one"]) == "one" and majority_of(["two", "one"]) == "two"
