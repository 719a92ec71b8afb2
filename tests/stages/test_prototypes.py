"""eval.answer prototype: the option whose training rows leave the model in the nearest state, by transformers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmtune.errors import DataError, RecipeError
from mmtune.models.composite.config import CompositeConfig
from mmtune.order import run_stages, stages_of
from mmtune.recipe import Eval, Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.evaluate.plan import check_one_state
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
NOUNS = ("sky", "sun", "sea", "rose", "lemon")


def table(folder: Path, split: str, count: int, answers: tuple[str, ...] = ("red", "yellow")) -> dict:
    rows = [
        {"q": f"{split} {NOUNS[at % 5]} {at} is {'hot' if at % 2 else 'far'}", "a": answers[at % len(answers)]}
        for at in range(count)
    ]
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "id": "t",
        "reader": "table",
        "split": split,
        "path": str(path),
        "columns": {"text": "q", "answer": "a", "options": "=red|yellow|blue"},
        "task": "sentiment_analysis",
        "template": "sentiment_list",
    }


def asked(folder: Path, model: Path, sources: list[dict], build: dict | None = None, **settings) -> Recipe:
    recipe = Recipe(
        run_dir=folder / "run",
        model={"path": str(model)},
        sources=sources,
        build={"workers": 1, **(build or {})},
        eval={"compare": ["base"], "answer": "prototype", "bootstrap": 100, "loss": False, **settings},
    )
    build_data(recipe, console=QUIET)
    return recipe


def state_of(folder: Path, prompt: str) -> np.ndarray:
    """Returns the last hidden state of a prompt, by transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    made = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.model(input_ids=made["input_ids"]).last_hidden_state[0, -1].numpy()


def prompts_of(recipe: Recipe, split: str) -> list[tuple[str, str]]:
    """Returns the prompt and the answer of every row of instructions/."""
    from mmtune.prompts.schema import row_to_example
    from mmtune.storage import open_split

    rows = [row_to_example(row) for row in open_split(recipe.run_dir / "instructions" / split).to_pylist()]
    # Exemplars stand before the last two turns.
    return [(row.messages[-2].text, row.messages[-1].text) for row in rows]


def test_the_answer_is_the_label_whose_mean_state_is_nearest(tmp_path: Path, tiny_vlm: Path):
    sources = [table(tmp_path, "train", 12), table(tmp_path, "val", 6)]
    # Training rows that show exemplars stand for their labels without them.
    recipe = asked(tmp_path, tiny_vlm, sources, {"exemplars": {"k": 1}})
    talk = Talk(quiet=True)
    evaluate(recipe, console=talk)
    assert "eval: prototypes of t: red 6, yellow 6, blue 0" in talk.lines
    states = [(state_of(tiny_vlm, prompt), answer) for prompt, answer in prompts_of(recipe, "train")]
    means = {name: np.mean([state for state, own in states if own == name], axis=0) for name in ("red", "yellow")}
    lines = [json.loads(line) for line in (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()]
    found = {line["prompt"]: line["prediction"] for line in lines}
    assert len(found) == 6
    for prompt, _ in prompts_of(recipe, "val"):
        state = state_of(tiny_vlm, prompt)
        assert found[prompt] == min(means, key=lambda name: ((means[name] - state) ** 2).sum())


def test_so_many_rows_of_every_label_are_looked_at(tmp_path: Path, tiny_vlm: Path):
    sources = [table(tmp_path, "train", 12), table(tmp_path, "val", 4)]
    recipe, talk = asked(tmp_path, tiny_vlm, sources, per_label=2), Talk(quiet=True)
    evaluate(recipe, console=talk)
    assert "eval: prototypes of t: red 2, yellow 2, blue 0" in talk.lines


@pytest.mark.parametrize("answers", [(), ("gone",)])
def test_without_training_rows_of_a_label_there_is_no_prototype(tmp_path: Path, tiny_vlm: Path, answers: tuple):
    train = [table(tmp_path, "train", 4, answers)] if answers else []
    recipe = asked(tmp_path, tiny_vlm, [*train, table(tmp_path, "val", 4)])
    with pytest.raises(DataError, match="no training row of 't'") as error:
        evaluate(recipe, console=QUIET)
    assert error.value.code == "no_prototypes" and not (recipe.run_dir / "report").exists()


def test_labels_without_training_rows_are_told_before_anything_is_trained(tmp_path: Path, tiny_vlm: Path):
    recipe = asked(tmp_path, tiny_vlm, [table(tmp_path, "train", 4), table(tmp_path, "val", 4)], answer="soft")
    with pytest.raises(DataError, match=r"eval\.answer soft: no training row of 't' answers with 'blue'"):
        run_stages(recipe, stages_of(recipe, None, True), force=False, dry_run=False, console=QUIET)
    assert not (recipe.run_dir / "tokens").exists()


def test_a_model_of_several_passes_has_no_one_state(tmp_path: Path, repository: Path):
    from mmtune.models.load import load_config

    omni = load_config(str(repository / "data" / "omni"))
    CompositeConfig(**{**omni.to_dict(), "fusion": {"mode": "late"}}).save_pretrained(tmp_path)
    recipe = asked(tmp_path, tmp_path, [table(tmp_path, "val", 4)], answer="soft")
    with pytest.raises(RecipeError, match="answer soft compares one state per row; this model reads rows in") as error:
        next(stages_of(recipe, None, True))
    assert error.value.exit_code == 2
    check_one_state(Eval(answer="soft"), str(repository / "data" / "omni"), None, offline=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shots": 2}, "leave out shots"),
        ({"ablate": ["instructions"]}, "leave out ablate"),
        ({"compare": ["base", "best_prompt"]}, "leave out compare best_prompt"),
        ({"answer": "rank", "per_label": 4}, "per_label is for answer prototype and soft"),
    ],
)
@pytest.mark.parametrize("answer", ["prototype", "soft"])
def test_settings_that_do_not_fit_together_are_refused(answer: str, settings: dict, expected: str):
    with pytest.raises(ValidationError, match=expected):
        Recipe(run_dir="x", eval={"answer": answer, **settings})
    with pytest.raises(ValidationError, match="prompt search"):
        Recipe(run_dir="x", eval={"answer": answer}, prompt={"method": "ape", "budget": 100})


def test_rows_without_options_have_nothing_to_choose_among(tmp_path: Path, tiny_vlm: Path):
    sources = [table(tmp_path, "train", 4), table(tmp_path, "val", 4)]
    for source in sources:
        del source["columns"]["options"]
        source["task"], source["template"] = "instruction", "instruction_plain"
    recipe = asked(tmp_path, tiny_vlm, sources)
    for dry_run in (False, True):
        with pytest.raises(DataError, match="no row of val has any") as error:
            evaluate(recipe, dry_run=dry_run, console=QUIET)
        assert error.value.code == "no_options" and 'sources[].columns.options: "=yes|no"' in error.value.hint
    # A run ends before it trains.
    with pytest.raises(DataError, match="no row of val has any"):
        run_stages(recipe, stages_of(recipe, None, True), force=False, dry_run=False, console=QUIET)
    assert not (recipe.run_dir / "tokens").exists()
