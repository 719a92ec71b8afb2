"""eval that ranks options: every answer is an option, and the one that transformers' own likelihood prefers."""

import json
from pathlib import Path

import pytest
import torch

from mmtune.recipe import Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.talk import Talk

QUIET = Talk(quiet=True)


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path):
    rows = [{"q": f"the number {at} is", "a": ("red", "yellow")[at % 2]} for at in range(12)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings) -> Recipe:
        source = {
            "id": "t",
            "reader": "table",
            "split": "val",
            "path": str(tmp_path / "t.jsonl"),
            "columns": {"text": "q", "answer": "a", "options": "=red|yellow|blue"},
            "task": "sentiment_analysis",
            **settings.pop("source", {}),
        }
        return Recipe(
            run_dir=tmp_path / "run",
            model={"path": str(tiny_vlm)},
            sources=[source],
            build={"workers": 1, **settings.pop("build", {})},
            eval={"compare": ["base"], "answer": "rank", "bootstrap": 100, "loss": False, **settings},
        )

    return make


def answers(recipe: Recipe) -> list[dict]:
    build_data(recipe, console=QUIET)
    evaluate(recipe, console=QUIET)
    return [json.loads(line) for line in (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()]


def likelihood(folder: Path, prompt: str, answer: str) -> float:
    """Returns the log-probability of an answer and its end by transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    asked = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    start = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    whole = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    # The line break after the end of the turn is no part of the answer.
    whole, at = whole[:, :-1], len(start["input_ids"][0])
    with torch.no_grad():
        logp_TV = model(input_ids=whole).logits[0].log_softmax(-1)
    return float(logp_TV[at - 1 : -1].gather(1, whole[0, at:, None]).sum())


def test_the_answer_is_the_likeliest_option(recipe, tiny_vlm: Path):
    found = answers(recipe())
    assert len(found) == 12 and {row["prediction"] for row in found} <= {"red", "yellow", "blue"}
    for row in found[:3]:
        scores = {option: likelihood(tiny_vlm, row["prompt"], option) for option in row["options"]}
        assert row["prediction"] == max(scores, key=lambda option: scores[option])


def test_rows_whose_options_hold_no_right_answer_are_counted(recipe, capfd):
    columns = {"text": "q", "answer": "a", "options": "=Yellow.|blue"}
    made = recipe(source={"columns": columns})
    build_data(made, console=QUIET)
    evaluate(made, console=Talk(quiet=True))
    said = "6 of 12 rows with options hold no right answer among them and score 0 in any case, the first t/val-0"
    notes = json.loads((made.run_dir / "report" / "metrics.json").read_text())["notes"]
    assert notes == [f"{said} (reference 'red')."] and said in capfd.readouterr().err


def test_options_without_a_right_answer_are_noted_where_they_answer_and_free_answers_beside_them(recipe):
    beside = ["12 of 12 answers of base to rows with options are none of these; eval.answer: rank answers by the"]
    for settings, noted in (
        ({}, []),
        ({"answer": "generate", "source": {"columns": {"text": "q", "answer": "a", "options": "=blue|x"}}}, beside),
    ):
        made = recipe(**settings)
        answers(made)
        notes = json.loads((made.run_dir / "report" / "metrics.json").read_text())["notes"]
        assert [note[: len(beside[0])] for note in notes] == noted


def test_scores_stand_by_template_too(recipe):
    made = recipe()
    answers(made)
    groups = json.loads((made.run_dir / "report" / "metrics.json").read_text())["groups"]
    assert len(groups["template"]) > 2 and sum(entry["accuracy"]["n"] for entry in groups["template"].values()) == 12
    assert "macro_f1" in groups["template"][next(iter(groups["template"]))]


def test_calibrated_answers_are_divided_by_those_of_the_content_free_prompt(recipe, tiny_vlm: Path):
    bare = [row["prediction"] for row in answers(recipe())]
    found = answers(recipe(build={"content_free": "N/A"}))
    for row in found[:4]:
        free = row["metadata"]["content_free"]
        scores = {
            option: likelihood(tiny_vlm, row["prompt"], option) - likelihood(tiny_vlm, free, option)
            for option in row["options"]
        }
        assert row["prediction"] == max(scores, key=lambda option: scores[option])
    assert bare != [row["prediction"] for row in found]


def test_words_of_the_verbalizer_are_summed(recipe):
    words = {"red": ["r", "ruby"], "yellow": "y", "blue": "b"}
    found = answers(recipe(source={"verbalizer": words}))
    assert {row["prediction"] for row in found} <= {"r", "y", "b"}
    assert found[0]["references"] == ["r", "ruby"]
