"""Match, F1, relaxed accuracy and error rates."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.errors import RecipeError
from mmtune.evaluation import ERROR_RATES, METRICS, NAMES, NORMALISERS, check_metric, measure, metrics_of
from mmtune.evaluation.text import accuracy, edit_distance, relaxed_accuracy, token_f1, word_errors

words = st.text(alphabet="ab1 ,.%'é", max_size=12)


def test_equals_the_official_squad_scorer(shared_datasets):
    folder = shared_datasets / "squad_eval_oracle"
    articles = json.loads((folder / "dataset.json").read_text())["data"]
    predictions = json.loads((folder / "predictions.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    pairs = [
        (predictions[question["id"]], [answer["text"] for answer in question["answers"]])
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    texts, references = [text for text, _ in pairs], [wanted for _, wanted in pairs]
    assert len(texts) == expected["total"]
    assert measure("exact_match", texts, references).score == pytest.approx(expected["exact"], abs=1e-9)
    assert measure("token_f1", texts, references).score == pytest.approx(expected["f1"], abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True),  # exactly 5 %
        ("1.05", "1", True),
        ("105.01", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0", "0", True),
        ("0.01", "0", False),  # no relative slack around zero
        ("14%", "14", True),
        ("1,234", "1234", True),
        ("1,23", "123", False),  # not thousands
        ("yes ", "Yes", True),
        ("nan", "nan", True),
        ("inf", "1", False),
        ("2", "two", False),
        ("[10, 21]", "[10, 20]", True),
        ("10, 21", "[10, 20]", True),
        ("[20, 10]", "[10, 20]", False),
        ("[10]", "[10, 20]", False),
        ("['A', 'B']", '["a", "b"]', True),
    ],
)
def test_relaxed_accuracy(prediction, reference, right):
    assert relaxed_accuracy(prediction, [reference]) == (100.0 if right else 0.0)


def test_accuracy_forgives_case_and_outer_marks_only():
    assert accuracy(" Cat. ", ["dog", "cat"]) == 100.0
    assert accuracy("a cat", ["cat"]) == 0.0
    assert accuracy("", ["cat"]) == 0.0


def test_f1_by_hand():
    assert token_f1("the cat sat", ["cat sat down"]) == pytest.approx(80.0)  # 2 of 2, 2 of 3
    assert token_f1("", ["the"]) == 100.0  # SQuAD: nothing left on both sides is "no answer" twice


def test_word_error_rate_is_summed_over_rows():
    assert word_errors("The cat!", ["the cat"]) == (0, 2)
    found = measure("wer", ["a b c", "x"], [["a b d"], ["x y z"]])
    assert found.score == pytest.approx(100 * 3 / 6)
    assert not found.higher_is_better
    assert word_errors("anything here", ["other", "anything there"]) == (1, 2)  # nearest reference


@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_edit_distance_is_a_metric(first, second, third):
    assert edit_distance(first, second) == edit_distance(second, first)
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)


@given(words, st.lists(words.map(lambda text: text + "b"), min_size=1, max_size=4))
def test_every_metric_is_in_range_and_best_of_its_references(prediction, references):
    for name, metric in METRICS.items():
        value = metric(prediction, references, ())
        assert 0.0 <= value <= 100.0, name
        assert metric(prediction, references[::-1], ()) == pytest.approx(value), name
        if name != "vqa_accuracy":
            assert value >= max(metric(prediction, [one], ()) for one in references) - 1e-9 or name == "rouge_l"
    for metric in ERROR_RATES.values():
        errors, length = metric(prediction, references)
        assert errors >= 0 and length >= 0


def test_tables_speak_of_the_same_metrics():
    assert set(NAMES) <= set(NORMALISERS)
    assert metrics_of("caption", "none", None) == ("cider", "rouge_l")
    assert metrics_of("vqa", "vqa_accuracy", None) == ("vqa_accuracy",)
    assert metrics_of("vqa", "vqa_accuracy", ["token_f1"]) == ("token_f1",)
    with pytest.raises(RecipeError) as error:
        check_metric("exactmatch")
    assert "did you mean 'exact_match'" in error.value.hint
