"""score: the official files in, the official numbers out; wrong files are named."""

import gzip
import json

import pytest

from mmtune.errors import DataError, RecipeError
from mmtune.stages.score import score


@pytest.fixture
def files(tmp_path):
    """Two official questions; the first is answered right, the second by one person in ten."""

    def annotation(number, answers, kind):
        given = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, 1)]
        return {
            "question_id": number,
            "image_id": 1,
            "answers": given,
            "question_type": f"{kind}?",
            "answer_type": kind,
        }

    questions = [{"question_id": number, "image_id": 1, "question": "?"} for number in (1, 2)]
    annotations = [annotation(1, ["yes"] * 10, "yes/no"), annotation(2, ["2"] + ["three"] * 9, "number")]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions, "info": {}}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations, "info": {}}))
    write(tmp_path, [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "two"}])
    return tmp_path


def write(folder, rows, name="p.json"):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def vqa(folder, predictions="p.json"):
    return score("vqa", predictions=folder / predictions, questions=folder / "q.json", annotations=folder / "a.json")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vqa_by_hand(files):
    found = vqa(files)
    assert found["overall"] == 65.0 and found["n"] == 2 and found["missing"] == 0
    assert found["perAnswerType"] == {"yes/no": 100.0, "number": 30.0}
    assert found["perQuestionType"] == {"yes/no?": 100.0, "number?": 30.0}


def test_vqa_equals_the_official_scorer_plain_and_gzipped(shared_datasets, tmp_path):
    folder = shared_datasets / "vqa_eval_oracle"
    expected = json.loads((folder / "expected_accuracy.json").read_text())
    plain = folder / "v2_OpenEnded_mscoco_val2014_fake_results.json"
    packed = tmp_path / "results.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for predictions in (plain, packed):
        found = score(
            "vqa",
            predictions=predictions,
            questions=folder / "v2_OpenEnded_mscoco_val2014_questions.json",
            annotations=folder / "v2_mscoco_val2014_annotations.json",
        )
        assert {key: found[key] for key in expected} == expected


def test_vqa_takes_the_predictions_of_a_report(files):
    rows = [
        {"id": f"vqa/{number}", "model": model, "prediction": text}
        for number, texts in ((1, ("no", "yes")), (2, ("x", "2")))
        for model, text in zip(("base", "tuned"), texts, strict=True)
    ]
    jsonl(files / "predictions.jsonl", rows)
    found = vqa(files, "predictions.jsonl")
    assert found["overall"] == 65.0 and found["model"] == "tuned"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "answer": "yes"}], "1 of the annotated questions are missing"),
        ([{"question_id": n, "answer": "yes"} for n in (1, 2, 3)], "1 of the predictions are not among"),
        ([{"question_id": 1, "answer": "a"}] * 2, "answers question 1 twice"),
        ([{"question_id": 1, "answer": None}], "no text in 'answer'"),
        ([{"question_id": "x", "answer": "a"}], "whole number is expected"),
        ([{"id": "vqa/none", "prediction": "a"}], "no question id in 'vqa/none'"),
        (["yes"], "is no object"),
    ],
)
def test_vqa_refuses_a_file_that_does_not_fit(files, rows, message):
    write(files, rows)
    with pytest.raises(DataError, match=message):
        vqa(files)


def test_vqa_refuses_damaged_official_files(files):
    text = (files / "a.json").read_text()
    (files / "a.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"a\.json"):
        vqa(files)
    (files / "a.json").write_text(text.replace('"answers": [', '"answers": [7, '))
    with pytest.raises(DataError, match="no list of human answers"):
        vqa(files)
    (files / "a.json").write_text(text)
    with pytest.raises(DataError, match="not there"):
        vqa(files, "absent.json")
    with pytest.raises(RecipeError, match="annotation file"):
        score("vqa", predictions=files / "p.json")


def test_texts_with_references_inside_or_beside(tmp_path):
    rows = [
        {"id": n, "prediction": text, "references": ["cat", "a dog"]} for n, text in enumerate(["Cat", "dog", "cow"])
    ]
    inside = jsonl(tmp_path / "p.jsonl", rows)
    found = score("exact_match", predictions=inside)
    assert (
        found["value"] == pytest.approx(66.6667) and found["n"] == 3 and found["low"] <= found["value"] <= found["high"]
    )
    bare = jsonl(tmp_path / "bare.jsonl", [{"id": row["id"], "prediction": row["prediction"]} for row in rows])
    beside = jsonl(tmp_path / "r.jsonl", [{"id": row["id"], "references": row["references"]} for row in rows[::-1]])
    assert score("exact_match", predictions=bare, references=beside) == found
    assert score("wer", predictions=inside)["higher_is_better"] is False
    assert score("bleu", predictions=inside)["value"] >= 0
    with pytest.raises(DataError, match="no references"):
        score("accuracy", predictions=bare)
    short = jsonl(tmp_path / "short.jsonl", [{"id": 0, "references": ["cat"]}])
    with pytest.raises(DataError, match="2 of the predictions are not among"):
        score("accuracy", predictions=bare, references=short)
    jsonl(bare, [{"id": 1, "prediction": "x", "references": "x"}] * 2)
    with pytest.raises(DataError, match="ids twice"):
        score("accuracy", predictions=bare)
    bare.write_text('{"id": 1, "prediction": "x", "refer')
    with pytest.raises(DataError, match=r"bare\.jsonl:1"):
        score("accuracy", predictions=bare)


def test_unknown_metric_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as error:
        score("vqaa", predictions=tmp_path / "p.jsonl")
    assert "did you mean 'vqa'" in error.value.hint and "relaxed_accuracy" in error.value.hint
    with pytest.raises(RecipeError, match="unknown metric") as error:
        score("blue", predictions=tmp_path / "p.jsonl")
    assert "did you mean 'bleu'" in error.value.hint


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": 5}, "p.jsonl:1: 'options' is no list of texts"),
        ({"options": "abc"}, "'options' is no list of texts"),
        ({"id": None}, "p.jsonl:1 has no id, a text or a whole number"),
        ({"id": [1]}, "has no id"),
        ({"id": True}, "has no id"),
        ({"prediction": 3}, "p.jsonl:1 has no text in 'prediction'"),
        ({"references": [3]}, "p.jsonl:1 has no references, a list of texts"),
        ({"references": []}, "has no references"),
    ],
)
def test_a_row_of_wrong_types_is_named(tmp_path, fields, said):
    path = jsonl(tmp_path / "p.jsonl", [{"id": 1, "prediction": "cat", "references": ["cat"], **fields}])
    with pytest.raises(DataError) as error:
        score("accuracy", predictions=path)
    assert said in error.value.message and error.value.hint


def test_vqa_accuracy_of_few_references_says_so(tmp_path):
    rows = [{"id": n, "prediction": "cat", "references": ["cat"] * count} for n, count in enumerate((1, 4))]
    found = score("vqa_accuracy", predictions=jsonl(tmp_path / "p.jsonl", rows))
    assert found["value"] == 50.0 and found["note"].startswith("VQA accuracy: 1 row has fewer than four references")
    assert "note" not in score("vqa_accuracy", predictions=jsonl(tmp_path / "p.jsonl", rows[1:]))


def test_references_that_stand_twice_are_refused(tmp_path):
    rows = jsonl(tmp_path / "p.jsonl", [{"id": 1, "prediction": "cat"}])
    beside = jsonl(tmp_path / "r.jsonl", [{"id": 1, "references": ["cat"]}, {"id": "1", "references": ["dog"]}])
    with pytest.raises(DataError, match=r"r\.jsonl has 1 ids twice"):
        score("accuracy", predictions=rows, references=beside)
