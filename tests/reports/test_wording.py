"""Numbers and verdicts as a report words them."""

import pytest

from mmtune.reports.wording import headline, named, p_value, perplexity, verdict


def test_verdict_needs_interval_and_test():
    def entry(value, low, high, p, higher=True):
        return {"difference": {"value": value, "low": low, "high": high, "p": p}, "higher_is_better": higher}

    assert verdict(entry(5, 1, 9, 0.01)) == "better"
    assert verdict(entry(5, 1, 9, 0.2)) == "unclear"
    assert verdict(entry(5, -1, 9, 0.01)) == "unclear"
    assert verdict(entry(-5, -9, -1, 0.01)) == "worse"
    assert verdict(entry(-5, -9, -1, 0.01, higher=False)) == "better"
    assert verdict({"higher_is_better": True}) == ""
    assert p_value(0.0004) == "< 0.001" and p_value(0.0123) == "0.012"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1978767.05, "1,980,000"),
        (999.6, "1,000"),
        (123.4, "123"),
        (12.345, "12.3"),
        (9.999, "10.0"),
        (1.0, "1.00"),
        (1.2345, "1.23"),
    ],
)
def test_a_perplexity_has_three_significant_digits(value, said):
    assert perplexity(value) == said and perplexity(float("inf")) == "inf"


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("exact_match", "exact match"),
        ("token_f1", "token F1"),
        ("vqa_accuracy", "VQA accuracy"),
        ("rouge_l", "ROUGE-L"),
        ("cider", "CIDEr"),
        ("wer", "word error rate"),
    ],
)
def test_a_metric_inside_a_sentence_keeps_its_abbreviation(metric, said):
    assert named(metric) == said


def test_the_finding_tells_of_models_that_answer_all_rows_alike():
    entry = {
        "n": 20,
        "media_groups": 20,
        "higher_is_better": True,
        "models": {"base": {"value": 40.0}, "tuned": {"value": 65.0}},
        "difference": {"value": 25.0, "low": 5.0, "high": 45.0, "p": 0.01},
    }
    report = {
        "run": {"split": "val", "pair": ["base", "tuned"]},
        "n": 20,
        "metrics": {"accuracy": entry},
        "alike": {"tuned": {"answer": "joy", "rows": 19, "among_references": 13}},
    }
    said = "The tuned model answers 'joy' to 19 of 20 rows, whatever they show; it is a reference of 13."
    assert headline(report).endswith(f"on 20 held-out rows. {said}")
    assert headline({**report, "alike": {}}).endswith("on 20 held-out rows.")
    assert headline({**report, "alike": {"tuned": {**report["alike"]["tuned"], "answer": "x" * 99}}}).count("x") == 57
    both = dict.fromkeys(("base", "tuned"), report["alike"]["tuned"])
    assert "The base model and the tuned model answer 'joy' to 19 of 20" in headline({**report, "alike": both})
