"""BLEU, ROUGE-L and CIDEr equal the official scorers on equal tokens."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.evaluation import measure
from mmtune.evaluation.caption import cider, corpus_bleu, rouge_l

captions = st.lists(st.sampled_from(["a", "the", "cat", "dog", "sat", "on", "mat"]), max_size=8).map(" ".join)


def test_equals_the_official_scorers(shared_datasets):
    folder = shared_datasets / "caption_metrics_oracle"
    data = json.loads((folder / "human_leave_one_out_200.json").read_text())
    expected = json.loads((folder / "expected_scores.json").read_text())["human_leave_one_out_200"]
    texts = [data["hypotheses"][key][0] for key in data["references"]]
    references = list(data["references"].values())
    for order in (1, 2, 3, 4):
        assert corpus_bleu(texts, references, order) / 100 == pytest.approx(expected[f"Bleu_{order}"], abs=1e-9)
    assert measure("rouge_l", texts, references).score / 100 == pytest.approx(expected["ROUGE_L"], abs=1e-9)
    assert measure("cider", texts, references).score / 100 == pytest.approx(expected["CIDEr"], abs=1e-9)


def test_equals_published_scores(shared_datasets):
    folder = shared_datasets / "caption_metrics_oracle"
    expected = json.loads((folder / "nlgeval_expected.json").read_text())
    texts = (folder / "nlgeval_hyp.txt").read_text().splitlines()
    references = list(zip(*[(folder / f"nlgeval_ref{n}.txt").read_text().splitlines() for n in (1, 2)], strict=True))
    assert corpus_bleu(texts, references) / 100 == pytest.approx(expected["Bleu_4"], abs=1e-6)
    assert measure("rouge_l", texts, references).score / 100 == pytest.approx(expected["ROUGE_L"], abs=1e-6)
    assert measure("cider", texts, references).score / 100 == pytest.approx(expected["CIDEr"], abs=1e-6)


def test_by_hand():
    # Two of three words in order, on both sides: F is 2/3 whatever the weight of recall.
    assert rouge_l("a cat sat", ["a dog sat"]) == pytest.approx(200 / 3)
    # The brevity penalty alone: every n-gram is right, one word of five is missing.
    assert corpus_bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(77.880078, abs=1e-4)
    # The only reference itself, with words that no other picture has.
    assert cider(["red cats sit here", "x"], [["red cats sit here"], ["y"]])[0] == pytest.approx(1000.0)


@given(st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=2, max_size=5))
def test_cider_does_not_depend_on_the_order_of_rows(rows):
    texts, references = [text for text, _ in rows], [wanted for _, wanted in rows]
    forward = cider(texts, references)
    assert cider(texts[::-1], references[::-1])[::-1] == pytest.approx(forward)
    assert all(value >= 0 for value in forward)
