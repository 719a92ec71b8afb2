"""Histories of users from a table to a report: built, joined, tokenized, trained with, tuned, asked without."""

import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest

from mmtune.errors import DataError, RecipeError
from mmtune.order import run_stages, stages_of
from mmtune.recipe.text import load_recipe
from mmtune.stages.assemble import assemble_stage
from mmtune.stages.build_data import build_data
from mmtune.stages.show import describe
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk

TEXT = """
run_dir: {folder}/run
sources:
  - {{id: films, reader: table, split: train, path: {folder}/train.jsonl, columns: {columns}, template: vqa_plain}}
  - {{id: films, reader: table, split: val, path: {folder}/val.jsonl, columns: {columns}, template: vqa_plain}}
tokenize: {{max_length: 128}}
pretrain:
  build:
    text: {text}
    encoders:
      behaviour: {{hidden_size: 16, num_attention_heads: 2, intermediate_size: 16, num_hidden_layers: 1, window: 4}}
    projectors: {{behaviour: {projector}}}
    fusion: {fusion}
  objectives: {objectives}
  codes: {{width: 8}}
  learning_rate: 2.0e-3
  max_steps: {steps}
  batch_rows: 32
  log_every: 1
finetune: {{lora: {{r: 2}}, train: [llm, behaviour], max_steps: 2, batch_rows: 8, learning_rate: 0.01, log_every: 1}}
eval: {{split: val, compare: [base], ablate: [modality], max_new_tokens: 3, bootstrap: 100}}
"""
COLUMNS = "{id: id, behaviour: past, question: question, answer: answer}"
TINY = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2}\n    tokenizer: "
ALL = "{caption: 1, reconstruction: 0.1, adversarial: 0.05, contrastive: 0.1, masked: 0.2, match: 0.2}"
CODED = "{caption: 1, reconstruction: 0.1, contrastive: 0.1}"
MLP = "{kind: mlp}"
RESAMPLED = "{kind: qformer, queries: 3, heads: 2, layers: 1, instruction: true}"
COLOURS = {"r": "red", "b": "blue"}
WAYS = {
    "early": ("{}", MLP, ALL),
    "late": ("{mode: late}", MLP, CODED),
    "hybrid": ("{mode: hybrid, modality_dropout: 0.2}", RESAMPLED, CODED),
    "self": ("{attention: self}", MLP, ALL),
    "cross": ("{attention: cross, layers: [1]}", MLP, ALL),
    "co": ("{attention: co, layers: [0, 1]}", RESAMPLED, ALL),
}


def users(folder, split, count):
    """Each user chose items of one kind, and likes what is of the kind: their history alone tells which."""
    draw = random.Random(split)
    lines = []
    for user in range(count):
        own = draw.choice("rb")
        past = [f"{own}{draw.randrange(6)}" for _ in range(draw.randrange(1, 7))] + (["new"] if split == "val" else [])
        answers = {
            "Which colour do they like?": COLOURS[own],
            "Will they like a red one?": "yes" if own == "r" else "no",
        }
        for at, (question, answer) in enumerate(answers.items()):
            row = {"id": f"{split}{user}_{at}", "past": past, "question": question, "answer": answer}
            lines.append(json.dumps(row) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")


@pytest.fixture
def recipe_at(tmp_path, repository):
    def make(*overrides, way="early", columns=COLUMNS, text=None, steps=3, rows=(24, 8)):
        for split, count in zip(("train", "val"), rows, strict=True):
            users(tmp_path, split, count)
        fusion, projector, objectives = WAYS[way]
        given = {"fusion": fusion, "projector": projector, "objectives": objectives, "steps": steps}
        given |= {"folder": tmp_path, "columns": columns, "text": text or f"{TINY}{repository / 'data' / 'base'}"}
        (tmp_path / "recipe.yaml").write_text(TEXT.format(**given), "utf-8")
        return load_recipe(tmp_path / "recipe.yaml", list(overrides), environ={})

    return make


def run(recipe):
    stages = stages_of(recipe, None, True)
    return run_stages(recipe, stages, force=False, dry_run=False, console=Talk(quiet=True))


def report_of(recipe):
    return json.loads((recipe.run_dir / "report" / "metrics.json").read_text("utf-8"))


def test_from_a_table_to_a_report(recipe_at):
    recipe = recipe_at("eval.compare=[base, tuned]")
    results = run(recipe)
    row = open_split(recipe.run_dir / "instructions" / "val").slice(0, 1).to_pylist()[0]
    assert row["histories"][0][-1] == "new" and row["messages"][0]["content"][0]["type"] == "behaviour"
    assert results["assemble"]["items"] == 12 and results["assemble"]["modalities"] == ["behaviour"]
    facts = read_manifest(recipe.run_dir / "tokens").facts
    assert facts["items_unknown"] == 16 and facts["histories_shortened"] > 0
    # Two questions of a user share the history.
    assert facts["tokens"] < 0.9 * facts["tokens_apart"]
    shown = describe(recipe.run_dir / "tokens", row=0, split="val")["row"]["runs"]
    assert any(run["text"].startswith("[behaviour: ") for run in shown)
    assert "without behaviour" in [one["name"] for one in report_of(recipe)["ablation"]["entries"]]
    assert "history: " in (recipe.run_dir / "report" / "index.html").read_text("utf-8")
    tuned = read_manifest(recipe.run_dir / "adapter").facts
    towers = tuned["towers"]
    assert (
        tuned["batches"] == "trees" and towers["behaviour"]["state"] == "lora" and towers["vision"]["state"] == "absent"
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(set(WAYS) - {"early"}))
def test_every_fusion_reads_histories(way, recipe_at):
    recipe = recipe_at(way=way)
    run(recipe)
    lines = [json.loads(line) for line in (recipe.run_dir / "base" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(f"loss_{name}" in lines[0] for name in recipe.pretrain.weights)
    assert "without behaviour" in [one["name"] for one in report_of(recipe)["ablation"]["entries"]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["early", "late", "hybrid"])
def test_beside_pictures(mode, recipe_at, repository, tmp_path):
    """Codes of both find and fill in each other; kept features of pictures stand beside histories that run live."""
    recipe = recipe_at(
        "pretrain.build.encoders.image={hidden_size: 16, num_attention_heads: 2, intermediate_size: 16, patch_size: 8}",
        f"pretrain.build.fusion={{mode: {mode}, modality_dropout: 0.2}}",
        "pretrain.objectives={caption: 1, reconstruction: 0.1, adversarial: 0.1, contrastive: 0.1}",
        "eval.ablate=[modality, fusion]" if mode != "early" else "eval.ablate=[modality]",
        "finetune.train=[llm, projector]",
        "finetune.features.use=on",
        columns="{id: id, behaviour: past, image: image, question: question, answer: answer}",
    )
    pictures = sorted(path.name for path in (repository / "data" / "scenes" / "train").glob("*.png"))
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "image": pictures[at // 2]}) + "\n" for at, row in enumerate(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    sources = [{**one.model_dump(), "images": str(repository / "data" / "scenes" / "train")} for one in recipe.sources]
    recipe = recipe.model_copy(update={"sources": [type(recipe.sources[0])(**one) for one in sources]})
    run(recipe)
    report = report_of(recipe)
    names = {one["name"] for one in report["ablation"]["entries"]}
    assert {"without image", "without behaviour", "without any medium"} <= names
    if mode != "early":
        assert {"image pass alone", "behaviour pass alone"} <= names
        (of_base,) = report["fusion"].values()
        assert set(of_base["branches"]) >= {"image", "behaviour"}
    filled = {(one["missing"], one["source"]) for one in report["filling"]}
    assert filled == {("image", "behaviour"), ("behaviour", "image")}
    assert (recipe.run_dir / "features" / "towers").is_dir()


@pytest.mark.slow
def test_tastes_are_learned_from_histories_alone(recipe_at, repository):
    text = str(repository / "data" / "base")
    recipe = recipe_at("finetune=null", "pretrain.objectives={caption: 1}", text=text, steps=60, rows=(400, 60))
    run(recipe)
    report = report_of(recipe)
    without = next(one for one in report["ablation"]["entries"] if one["name"] == "without behaviour")
    assert report["metrics"]["token_f1"]["models"]["base"]["value"] > 95
    assert without["metrics"]["token_f1"]["models"]["without behaviour"]["value"] < 70


def test_other_items_are_another_model(recipe_at, tmp_path):
    recipe = recipe_at()
    build_data(recipe, console=Talk(quiet=True))
    assert not assemble_stage(recipe, console=Talk(quiet=True))["cached"]
    assert assemble_stage(recipe, console=Talk(quiet=True))["cached"]
    with open(tmp_path / "train.jsonl", "a") as handle:
        handle.write('{"id": "more", "past": ["one more"], "question": "Will they?", "answer": "yes"}\n')
    build_data(recipe, force=True, console=Talk(quiet=True))
    again = assemble_stage(recipe, console=Talk(quiet=True))
    assert not again["cached"] and again["items"] == 13


def test_exemplars_show_histories_and_never_the_rows_own(recipe_at):
    recipe = recipe_at("build.exemplars={method: random, k: 2}")
    build_data(recipe, console=Talk(quiet=True))
    rows = open_split(recipe.run_dir / "instructions" / "train").to_pylist()
    assert len(rows) == 48 and all(len(row["exemplar_ids"]) == 2 and len(row["histories"]) == 3 for row in rows)
    assert all(row["histories"][-1] not in row["histories"][:-1] for row in rows)


def test_a_dry_run_waits_for_the_items(recipe_at):
    recipe, said = recipe_at(), []
    talk = Talk(quiet=True)
    talk.say = said.append
    run_stages(recipe, stages_of(recipe, None, True), force=False, dry_run=True, console=talk)
    assert "assemble: would run once instructions is there" in said


def test_recipes_that_cannot_be_are_named(recipe_at):
    without = recipe_at(columns="{id: id, question: question, answer: answer}")
    with pytest.raises(DataError, match="not there"):
        assemble_stage(without, console=Talk(quiet=True))
    build_data(without, console=Talk(quiet=True))
    with pytest.raises(DataError, match="no training row has a history with items") as refused:
        assemble_stage(without, console=Talk(quiet=True))
    assert "columns: {behaviour:" in refused.value.hint
    recipe = recipe_at("pretrain.build.encoders.behaviour.vocab_size=9")
    build_data(recipe, force=True, console=Talk(quiet=True))
    with pytest.raises(RecipeError, match="vocab_size follows from the training rows"):
        assemble_stage(recipe, console=Talk(quiet=True))
    recipe = recipe_at("pretrain.build.encoders.behaviour.window=0")
    with pytest.raises(RecipeError, match=r"behaviour\.window: 0 is no number of 1 or more"):
        assemble_stage(recipe, console=Talk(quiet=True))
    recipe = recipe_at("pretrain.build.encoders.behaviour.unknown_rate=1")
    with pytest.raises(RecipeError, match=r"unknown_rate: 1 is no number from 0 to below 1"):
        assemble_stage(recipe, console=Talk(quiet=True))


def test_a_model_without_behaviour_refuses_these_rows_by_name(recipe_at, repository):
    path = str(repository / "data" / "base")
    recipe = recipe_at("pretrain=null", "finetune=null", f"model.path={path}")
    build_data(recipe, console=Talk(quiet=True))
    with pytest.raises(DataError, match="modality_unsupported 64") as refused:
        tokenize(recipe, console=Talk(quiet=True))
    assert "reads no such media" in refused.value.hint


@pytest.mark.slow
def test_films_that_real_users_chose(recipe_at, tmp_path, shared_datasets):
    folder = shared_datasets / "movielens_latest_small"
    if not (folder / "ratings.csv").is_file():
        pytest.skip(f"there are no ratings at {folder}")
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from bench_recommendation import decades_of, rows_of, users_of

    recipe = recipe_at()
    known, decades = users_of(folder), decades_of(folder)
    assert len(known) == 608 and 100_000 < sum(map(len, known)) < 100_840
    for split, own in (("train", "train"), ("val", "test")):
        rows = list(islice(rows_of(known[:40], decades, own, 4), 64))
        assert {"1980s", "1990s"} < {row["answer"] for row in rows}
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    results = run(recipe)
    assert results["assemble"]["items"] > 200 and not results["tokenize"]["drops"]
    assert read_manifest(recipe.run_dir / "tokens").facts["items_unknown"] > 0
