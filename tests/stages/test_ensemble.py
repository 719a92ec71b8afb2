"""eval.ensemble: templates or adapters that answer together, against transformers' own likelihoods."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.recipe import Eval, Recipe
from mmtune.recipe.paths import resolve_paths
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.evaluate.ensemble import check_members, members_of
from mmtune.stages.evaluate.plan import check_rows
from mmtune.storage import read_manifest
from mmtune.storage.manifest import write_manifest
from mmtune.talk import Talk
from tests.stages.test_ranked_eval import QUIET, likelihood, recipe

__all__ = ["recipe"]

TWO = ("sentiment_label", "sentiment_flan")


def answers(made: Recipe) -> dict[str, list[dict]]:
    build_data(made, console=QUIET)
    evaluate(made, console=QUIET)
    found: dict[str, list[dict]] = {}
    for line in (made.run_dir / "report" / "predictions.jsonl").read_text().splitlines():
        found.setdefault(json.loads(line)["model"], []).append(json.loads(line))
    return found


def test_templates_answer_by_the_mean_of_their_probabilities(recipe, tiny_vlm: Path):
    made = recipe(ensemble={"wordings": list(TWO)})
    found = answers(made)
    assert list(found) == ["base", *(f"base, {name}" for name in TWO), "base, ensemble"]
    prompts = {name: [row["prompt"] for row in found[f"base, {name}"]] for name in TWO}
    assert all("OPTIONS" in text for text in prompts["sentiment_flan"])
    for at in range(4):
        options = found["base"][at]["options"]
        mean = np.zeros(3)
        for name in TWO:
            score = np.exp([likelihood(tiny_vlm, prompts[name][at], option) for option in options])
            assert found[f"base, {name}"][at]["prediction"] == options[int(score.argmax())]
            mean += score / score.sum() / 2
        assert found["base, ensemble"][at]["prediction"] == options[int(mean.argmax())]
    document = json.loads((made.run_dir / "report" / "metrics.json").read_text())
    assert any("asks 12 rows 24 times, under the templates sentiment_label (12)," in note for note in document["notes"])
    # A row's own template says nothing of members, which ask it in another; samples show who is compared.
    for found_by in document["groups"]["template"].values():
        assert list(found_by["accuracy"]["models"]) == ["base", "base, ensemble"]
    page = (made.run_dir / "report" / "index.html").read_text()
    assert page.count("base, sentiment_flan") < 8 < page.count("base, ensemble")
    # Only what replaces the row's own wording is tested; members are no systems of their own.
    assert document["run"]["pair"] == ["base", "base, ensemble"]
    assert all("wordings" not in row["metadata"] for row in found["base"])


def test_an_ensemble_of_one_template_is_that_template(recipe):
    one = answers(recipe(ensemble={"wordings": ["sentiment_tone"]}))
    assert [row["prediction"] for row in one["base, ensemble"]] == [
        row["prediction"] for row in one["base, sentiment_tone"]
    ]
    alone = answers(recipe(source={"template": "sentiment_tone"}))["base"]
    for row, other in zip(one["base, sentiment_tone"], alone, strict=True):
        assert (row["prompt"], row["prediction"]) == (other["prompt"], other["prediction"])


def test_every_fitting_template_is_a_member_and_calibration_is_its_own(recipe):
    found = answers(recipe(ensemble={"wordings": "all"}, build={"content_free": "N/A"}))
    assert len(found) > 8
    alone = answers(recipe(source={"template": "sentiment_tone"}, build={"content_free": "N/A"}))["base"]
    assert [row["prediction"] for row in found["base, sentiment_tone"]] == [row["prediction"] for row in alone]


def test_wordings_that_fit_no_row_are_refused_before_a_model_is_loaded(recipe):
    """Such an ensemble has no members, and what it answers would be called its answer."""
    made = recipe(ensemble={"wordings": ["sentiment_label", "vqa_plain"]})
    build_data(made, console=QUIET)
    with pytest.raises(DataError, match="no row of val has options and is asked under vqa_plain") as error:
        check_rows(made.run_dir, made.eval)
    assert error.value.code == "no_wordings" and "name some of: sentiment_label" in error.value.hint


def test_wordings_that_were_not_built_or_do_not_exist_are_refused(recipe):
    build_data(recipe(), console=QUIET)
    with pytest.raises(IntegrityError, match="does not keep the wordings") as error:
        evaluate(recipe(ensemble={"wordings": "all"}), console=QUIET)
    assert error.value.code == "other_wordings" and "build-data" in error.value.hint
    with pytest.raises(RecipeError, match="unknown template 'sentiment_lable'") as wrong:
        build_data(recipe(ensemble={"wordings": ["sentiment_lable"]}), console=QUIET)
    assert "did you mean 'sentiment_label'" in wrong.value.hint and "choice" not in wrong.value.hint
    with pytest.raises(RecipeError, match="unknown template 'nope'") as wrong:
        build_data(recipe(source={"task": "vqa"}, ensemble={"wordings": ["choice_list", "nope"]}), console=QUIET)
    assert "some of: choice_among, choice_flan, choice_list, label_" in wrong.value.hint


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ensemble": {"wordings": "all"}, "answer": "generate"}, "set answer: rank"),
        ({"ensemble": {"wordings": "all"}, "shots": [2]}, "leave shots out"),
        ({"ensemble": {"adapters": ["a"]}}, "add tuned to compare"),
        ({"ensemble": {"adapters": ["a"]}, "compare": ["tuned"], "answer": "generate"}, "first always wins: name two"),
        ({"ensemble": {"adapters": ["a"]}, "compare": ["tuned"], "answer": "soft"}, "first always wins: name two"),
        ({"ensemble": {"adapters": ["a", "a"]}, "compare": ["tuned"]}, "named twice"),
        ({"ensemble": {"adapters": ["a"], "wordings": "all"}}, "either wordings or adapters"),
        ({"ensemble": {}}, "either wordings or adapters"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict, expected: str):
    with pytest.raises(ValidationError, match=expected):
        Recipe(run_dir="x", eval={"compare": ["base"], "answer": "rank", **settings})


def test_a_searched_prompt_words_rows_alone():
    with pytest.raises(ValidationError, match=r"build\.prompt words every row"):
        Recipe(run_dir="x", build={"prompt": "p.json"}, eval={"answer": "rank", "ensemble": {"wordings": "all"}})


def test_relative_adapters_are_relative_to_the_recipe(tmp_path: Path):
    values = resolve_paths({"eval": {"ensemble": {"adapters": ["../one/adapter", "/two"]}}}, tmp_path / "here")
    assert values["eval"]["ensemble"]["adapters"] == [str(tmp_path / "one" / "adapter"), "/two"]
    one = resolve_paths({"eval": {"ensemble": {"adapters": "../one/adapter"}}}, tmp_path / "here")
    assert one["eval"]["ensemble"]["adapters"] == [str(tmp_path / "one" / "adapter")]


def test_one_name_needs_no_list():
    asked = {"run_dir": "x", "eval": {"answer": "rank", "compare": ["tuned"]}}
    found = Recipe(**{**asked, "eval": {**asked["eval"], "ensemble": {"wordings": "sentiment_flan"}}})
    assert found.eval.ensemble.wordings == ("sentiment_flan",)
    assert Recipe(**{**asked, "eval": {**asked["eval"], "ensemble": {"adapters": "a"}}}).eval.ensemble.adapters == (
        "a",
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_vlm: Path):
    """Returns two runs of a soft prompt that differ in the seed, on the same rows."""
    from mmtune.stages.finetune import finetune
    from mmtune.stages.tokenize import tokenize

    folder, made = tmp_path_factory.mktemp("tuned"), {}
    for split in ("train", "val"):
        rows = [{"q": f"the {split} number {at} is", "a": ("red", "yellow")[at % 2]} for at in range(8)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {
            "id": "t",
            "reader": "table",
            "split": split,
            "path": str(folder / f"{split}.jsonl"),
            "columns": {"text": "q", "answer": "a", "options": "=red|yellow|blue"},
            "task": "sentiment_analysis",
        }
        for split in ("train", "val")
    ]
    for seed in (0, 1):
        made[seed] = Recipe(
            run_dir=folder / f"seed{seed}",
            seed=seed,
            model={"path": str(tiny_vlm)},
            sources=sources,
            build={"workers": 1},
            finetune={"method": "prompt", "virtual_tokens": 4, "max_steps": 3, "batch_rows": 4, "learning_rate": 0.5},
            eval={"compare": ["tuned"], "answer": "rank", "bootstrap": 100, "loss": False},
        )
        for stage in (build_data, tokenize, finetune):
            stage(made[seed], console=Talk(quiet=True))
    return made


def test_a_finished_run_takes_up_wordings_without_training_again(tuned, tmp_path: Path):
    from mmtune.stages.finetune import finetune
    from mmtune.stages.tokenize import tokenize

    folder = tmp_path / "run"
    shutil.copytree(tuned[0].run_dir, folder)
    asked = {**tuned[0].eval.model_dump(exclude_unset=True), "ensemble": {"wordings": list(TWO)}}
    recipe = Recipe.model_validate({**tuned[0].model_dump(exclude_unset=True), "run_dir": folder, "eval": asked})
    done = [stage(recipe, console=QUIET) for stage in (build_data, tokenize, finetune)]
    assert [one["cached"] for one in done] == [False, True, True]
    assert list(said(recipe)) == ["tuned", *(f"tuned, {name}" for name in TWO), "tuned, ensemble"]
    made = json.loads((folder / "report" / "metrics.json").read_text())["manifests"]
    assert [one["folder"] for one in made] == ["instructions", "tokens", "adapter"]


def joined(made: Recipe, folder: Path, adapters: list[Path], **settings) -> Recipe:
    for name in ("instructions", "adapter"):
        if not (folder / name).exists():
            shutil.copytree(made.run_dir / name, folder / name)
    given = {**made.eval.model_dump(exclude_unset=True), "ensemble": {"adapters": list(map(str, adapters))}, **settings}
    return Recipe.model_validate({**made.model_dump(exclude_unset=True), "run_dir": folder, "eval": given})


def said(recipe: Recipe) -> dict[str, list[str]]:
    evaluate(recipe, console=QUIET, force=True)
    found: dict[str, list[str]] = {}
    for line in map(json.loads, (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()):
        found.setdefault(line["model"], []).append(line["prediction"])
    return found


def test_soft_prompts_of_other_seeds_answer_together(tuned, tmp_path: Path, recwarn):
    other = tuned[1].run_dir / "adapter"
    recipe = joined(tuned[0], tmp_path / "both", [other], compare=["base", "tuned"])
    found = said(recipe)
    assert list(found) == ["base", "tuned", "tuned, seed1", "tuned, ensemble"]
    document = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    assert document["run"]["pair"] == ["base", "tuned"]
    assert {(one["first"], one["second"]) for one in document["metrics"]["accuracy"]["steps"]} == {
        ("base", "tuned"),
        ("tuned", "tuned, ensemble"),
    }
    # Where nothing is ranked three vote, two of them copies of one.
    copy = tmp_path / "copy" / "adapter"
    shutil.copytree(other, copy)
    alone = said(joined(tuned[0], tmp_path / "free", [other, copy], answer="generate", max_new_tokens=3))
    assert alone["tuned, ensemble"] == alone["tuned, seed1"]
    assert not [str(one.message) for one in recwarn if issubclass(one.category, UserWarning)]


def test_two_copies_of_an_adapter_are_that_adapter(tuned, tmp_path: Path):
    found = said(joined(tuned[0], tmp_path / "run", [tuned[0].run_dir / "adapter"]))
    assert found["tuned"] == found["tuned, seed0"] == found["tuned, ensemble"]


def test_an_adapter_of_another_base_or_none_is_refused(tuned, tmp_path: Path):
    copy = tmp_path / "other" / "adapter"
    shutil.copytree(tuned[1].run_dir / "adapter", copy)
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, config={**manifest.config, "model": "another", "weights": "others"}))
    with pytest.raises(IntegrityError, match="was tuned from another") as error:
        said(joined(tuned[0], tmp_path / "run", [copy]))
    assert error.value.code == "other_model"
    write_manifest(copy, replace(manifest, config={**manifest.config, "model": "where it was before"}))
    members = members_of(Eval.model_validate({"answer": "rank", "ensemble": {"adapters": [str(copy)]}}))
    check_members(members, "where it is", manifest.config["weights"])
    with pytest.raises(IntegrityError, match="was tuned from where it was before"):
        check_members(members, "where it is", None)
    write_manifest(copy, replace(manifest, stage="prompt"))
    with pytest.raises(IntegrityError, match="was made by prompt, it is no adapter"):
        said(joined(tuned[0], tmp_path / "run", [copy]))
    with pytest.raises(DataError, match="not there"):
        said(joined(tuned[0], tmp_path / "run", [tmp_path / "gone" / "adapter"]))
