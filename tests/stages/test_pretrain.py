"""Parts to a base model on bundled scenes: parts add up, a weight of 0 is no objective, resume is exact."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmtune.encoding.collate import Collator
from mmtune.encoding.processor import load_processor
from mmtune.errors import DataError, Interrupted, RecipeError
from mmtune.models.load import load_model
from mmtune.recipe.text import load_recipe
from mmtune.stages.assemble import assemble_stage, join
from mmtune.stages.build_data import build_data
from mmtune.stages.pretrain import pretrain
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk
from mmtune.training.batching import Split, rows_apart
from mmtune.training.heads import codes_of, load_heads

WEIGHTS = "{caption: 1, reconstruction: 0.1, adversarial: 0.05, contrastive: 0.1, masked: 0.5, match: 0.2}"
TEXT = """
run_dir: {folder}/run
sources:
  - id: t
    reader: vqa_v2
    questions: {data}/scenes/annotations/compare_train_questions.json
    annotations: {data}/scenes/annotations/compare_train_annotations.json
    images: {data}/scenes/train
    limit: 16
{more}
pretrain:
  build:
    text: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
    tokenizer: {data}/base
    encoders: {encoders}
  objectives: {weights}
  codes: {{width: 8}}
  max_steps: 6
  batch_rows: 4
  save_every: 2
  log_every: 1
"""
IMAGE = "image: {hidden_size: 16, intermediate_size: 16, image_size: 24, patch_size: 12}"


@pytest.fixture
def recipe_at(tmp_path, repository):
    def make(*overrides, weights=WEIGHTS, encoders="{" + IMAGE + "}", more=""):
        path = tmp_path / "recipe.yaml"
        text = TEXT.format(folder=tmp_path, data=repository / "data", weights=weights, encoders=encoders, more=more)
        path.write_text(text, "utf-8")
        return load_recipe(path, list(overrides), environ={})

    return make


def made(recipe, last=None, **options):
    build_data(recipe, console=Talk(quiet=True))
    assemble_stage(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    pretrain(recipe, console=last or Talk(quiet=True), **options)
    return (recipe.run_dir / "base" / "model.safetensors").read_bytes()


def lines(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "base" / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_weighted_sum_of_its_parts(recipe_at, capsys):
    recipe = recipe_at()
    made(recipe, last=Talk())
    found = lines(recipe)
    # The terminal tells the parts of the last line in a table, the sum beside the folder.
    told, last = capsys.readouterr().err, found[-1]
    assert re.search(rf"loss_reconstruction +│ +{last['loss_reconstruction']:.4f}\s", told)
    assert f"pretrain: wrote {recipe.run_dir / 'base'} (loss {last['loss']:.4f})" in told
    assert len(found) == 6
    for line in found:
        parts = {name: line[f"loss_{name}"] for name in recipe.pretrain.weights}
        assert len(parts) == 6 and all(value >= 0 for value in parts.values())
        total = sum(weight * parts[name] for name, weight in recipe.pretrain.weights.items())
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        rebuilt = line["reconstruction_image"] + line["reconstruction_text"]
        assert line["loss_reconstruction"] == pytest.approx(rebuilt, rel=1e-6)


def test_weight_zero_is_bit_for_bit_no_objective(recipe_at):
    without = made(recipe_at(weights="{caption: 1}"))
    assert made(recipe_at(weights="{caption: 1, contrastive: 0.1}"), force=True) != without
    assert made(recipe_at(weights="{caption: 1, contrastive: 0, adversarial: 0}"), force=True) == without


@pytest.mark.parametrize(
    ("key", "value"), [("noise", 0.5), ("feature_noise", 0.5), ("sphere", True), ("gradient_penalty", 0.5)]
)
def test_codes_are_made_as_the_recipe_says_and_the_heads_know_it(recipe_at, key, value):
    plain = made(recipe_at())
    other = recipe_at(f"pretrain.codes.{key}={json.dumps(value)}")
    assert made(other, force=True) != plain
    learner = load_heads(load_model(str(other.run_dir / "base")), other.run_dir / "base")
    assert getattr(learner.settings.codes, key) == value


def test_codes_go_by_what_all_training_rows_are_like(recipe_at):
    given = {"weights": "{contrastive: 1}"}
    source = recipe_at(**given).model_dump(mode="json")["sources"][0] | {"limit": 400}
    recipe = recipe_at(f"sources={json.dumps([source])}", "pretrain.max_steps=1", **given)
    made(recipe)
    base, tokens = recipe.run_dir / "base", read_manifest(recipe.run_dir / "tokens")
    collate = Collator(load_processor(str(base)), media_root=Path(tokens.facts["media_root"]))
    course = {"batch_tokens": 10**6, "batch_rows": 400, "seed": 0, "micro_batches": 1, "epochs": 1.0}
    rows = rows_apart(Split(open_split(recipe.run_dir / "tokens" / "train"), collate), course).batches
    codes = codes_of(load_heads(load_model(str(base)), base), rows.batch(range(400)))
    # By some of them means would be off, each part's its own way, and tell a picture's code from a text's.
    for part, code in codes.items():
        torch.testing.assert_close(code.mean(0), torch.zeros(8), atol=1e-3, rtol=0, msg=part)
        torch.testing.assert_close(code.std(0, correction=0), torch.ones(8), atol=1e-3, rtol=0, msg=part)


def test_validation_looks_at_so_many_rows_every_so_many_steps(recipe_at, repository):
    notes = repository / "data" / "scenes" / "annotations"
    asked = f"questions: {notes}/compare_val_questions.json, annotations: {notes}/compare_val_annotations.json"
    val = f"  - {{id: v, reader: vqa_v2, split: val, {asked}, images: {repository}/data/scenes/val, limit: 6}}"

    def course(rows):
        given = ("pretrain.eval_every=1", f"pretrain.eval_rows={rows}", "pretrain.max_steps=2")
        recipe = recipe_at(*given, weights="{caption: 1}", more=val)
        made(recipe, force=True)
        return [(line["loss"], line["val_loss"]) for line in lines(recipe)]

    few, many = course(1), course(512)
    assert [loss for loss, _ in few] == [loss for loss, _ in many] and len(few) == 2
    assert all(one != other for (_, one), (_, other) in zip(few, many, strict=True))


def test_an_interrupted_run_ends_with_the_same_bytes(recipe_at, monkeypatch):
    import mmtune.training.loop as loop

    staged = recipe_at("pretrain.unfreeze={image: 1}", "pretrain.codes.noise=0.5", "pretrain.log_every=4")
    whole = made(staged)
    metrics = [{name: line[name] for name in line if name.startswith("loss")} for line in lines(staged)]
    shutil.rmtree(staged.run_dir / "base")
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stop_wanted", lambda _: next(asked))
        with pytest.raises(Interrupted):
            pretrain(staged, console=Talk(quiet=True))
    pretrain(staged, console=Talk(quiet=True))
    assert (staged.run_dir / "base" / "model.safetensors").read_bytes() == whole
    again = [{name: line[name] for name in line if name.startswith("loss")} for line in lines(staged)]
    assert again == metrics


@pytest.mark.parametrize(
    ("fusion", "share"),
    [("{}", 0.0), ("{mode: late}", 0.5), ("{mode: hybrid}", 0.5), ("{mode: late, auxiliary_loss: 0}", 0.0)],
)
def test_passes_learn_by_their_own_answers_unless_the_recipe_says_otherwise(recipe_at, fusion, share):
    recipe = recipe_at(f"pretrain.build.fusion={fusion}", weights="{caption: 1}")
    assert join(recipe.pretrain.build, recipe.seed, offline=True)[0].config.fusion["auxiliary_loss"] == share


def test_bad_recipes_are_named(recipe_at):
    for overrides, said in (
        (["pretrain.objectives={caption: 0}"], "sum to 0"),
        (["pretrain.build.encoders={smell: {}}"], "smell"),
        (["pretrain.build.encoders={image: {}, video: {}}"], "no encoder of video: a video is its sampled frames"),
        (["model.path=elsewhere"], "leave out model.path"),
        (["pretrain.train=[llm]", "pretrain.unfreeze={image: 1}"], "image, which does not train"),
        (["pretrain.batch_rows=1"], "compares the rows of a micro batch"),
        (["pretrain.build.fusion={auxiliary_loss: 0.5}"], "auxiliary_loss is for mode late and hybrid"),
    ):
        with pytest.raises(RecipeError, match=said):
            recipe_at(*overrides)
    with pytest.raises(RecipeError, match="stays frozen"):
        made(recipe_at("pretrain.train=[vision]", "pretrain.unfreeze={image: 1}"))
    with pytest.raises(RecipeError, match=r"encoders\.audio\.mel_std: 0 is no number above 0"):
        made(recipe_at(encoders="{audio: {mel_std: 0}}"))


def test_an_objective_without_its_media_is_refused(recipe_at):
    with pytest.raises(DataError, match="no training row has audio"):
        made(recipe_at(encoders="{" + IMAGE + ", audio: {hidden_size: 16, num_mel_bins: 16}}"))


SOUNDS = """  - id: s
    reader: table
    path: {data}/sounds/annotations/train.jsonl.gz
    columns: {{id: id, question: question, answer: answer, audio: audio}}
    audios: {data}/sounds/train
    limit: 8
"""


def test_codes_that_no_row_pairs_are_refused_or_said(recipe_at, repository):
    both = {"encoders": "{" + IMAGE + ", audio: {hidden_size: 16, num_mel_bins: 16}}"}
    both["more"] = SOUNDS.format(data=repository / "data")
    with pytest.raises(DataError, match="contrastive needs rows with two of image, audio"):
        made(recipe_at(**both, weights="{contrastive: 1}"))
    recipe = recipe_at(**both, weights="{adversarial: 1}")
    console = Talk(quiet=True)
    pretrain(recipe, console=console)
    assert any("adversarial learns to fill in no code" in line for line in console.lines)
    assert not any(name.startswith("fill_error") for line in lines(recipe) for name in line)


@pytest.mark.parametrize("name", ["masked", "match"])
def test_what_compares_media_with_words_needs_media(recipe_at, tmp_path, name):
    source = words_alone(tmp_path).strip("- \n")
    with pytest.raises(DataError, match=f"objective {name} needs rows with media"):
        made(recipe_at(f"sources=[{source}]", weights=f"{{caption: 1, {name}: 1}}"))


def words_alone(folder, rows=16):
    """The source of a table without media."""
    lines = [json.dumps({"q": f"What is {number} and one?", "a": str(number + 1)}) for number in range(rows)]
    (folder / "words.jsonl").write_text("\n".join(lines), "utf-8")
    return f"  - {{id: w, reader: table, path: {folder}/words.jsonl, columns: {{question: q, answer: a}}}}"


def test_what_joins_the_parts_waits_for_rows_with_media(recipe_at, tmp_path):
    beside = "pretrain.build.fusion={attention: co, layers: [0]}"
    for overrides in ([beside], ["pretrain.build.fusion={mode: hybrid}", "pretrain.train=[projector, fusion]"]):
        recipe = recipe_at(*overrides, "pretrain.batch_rows=1", weights="{caption: 1}", more=words_alone(tmp_path))
        made(recipe, force=True)
        assert len(lines(recipe)) == 6


def test_the_loss_of_each_task_stands_by_its_name_and_weighs_as_asked(recipe_at, tmp_path):
    words = words_alone(tmp_path).replace("reader: table", "reader: table, task: question_answering")
    first = []
    for weights in ("{}", "{question_answering: 0}", "{question_answering: 0.25}"):
        recipe = recipe_at(f"pretrain.task_weights={weights}", weights="{caption: 1}", more=words)
        made(recipe, force=True)
        tasks = {name for line in lines(recipe) for name in line if name.startswith("loss_task_")}
        assert len(tasks) == 2 and "loss_task_question_answering" in tasks
        first.append(next(line for line in lines(recipe) if tasks <= set(line)))
    (other,) = tasks - {"loss_task_question_answering"}
    one, two = sorted((first[0][other], first[0]["loss_task_question_answering"]))
    assert one < first[0]["loss"] < two
    # The loss is a sum over tasks, each by its share of all label tokens: what the others weigh changes nothing of it.
    share = (first[0]["loss"] - first[0]["loss_task_question_answering"]) / (
        first[0][other] - first[0]["loss_task_question_answering"]
    )
    for line, weight in ((first[1], 0), (first[2], 0.25)):
        expected = share * line[other] + weight * (1 - share) * line["loss_task_question_answering"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(RecipeError, match="the task nonsense, of which there is no row"):
        made(recipe_at("pretrain.task_weights={nonsense: 1}", more=words), force=True)


def test_soft_tokens_are_for_finetune(recipe_at, tmp_path):
    (tmp_path / "t.yaml").write_text("mine:\n  - ['{soft: 2} {media}', '{answer}']\n")
    with pytest.raises(DataError, match="learned by finetune"):
        made(recipe_at(f"build.templates={tmp_path / 't.yaml'}"))


def changed(recipe):
    """Names of the weights that are not those of start/."""
    before, after = (load_file(recipe.run_dir / stage / "model.safetensors") for stage in ("start", "base"))
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_what_joins_the_parts_trains_where_the_language_model_is_frozen(recipe_at):
    fusion = "pretrain.build.fusion={attention: cross, layers: [0]}"
    recipe = recipe_at(fusion, "pretrain.train=[projector]", weights="{caption: 1}")
    made(recipe)
    moved = changed(recipe)
    assert any("media_attention" in name for name in moved) and any("multi_modal_projector" in name for name in moved)
    assert all("media_attention" in name or "multi_modal_projector" in name for name in moved), moved


def test_a_staged_tower_stands_still_until_its_epoch(recipe_at):
    # Sixteen rows by four: an epoch has four steps.
    staged = ["pretrain.unfreeze={image: 1}", "pretrain.warmup=0"]
    for steps, moves in ((4, False), (5, True)):
        recipe = recipe_at(*staged, f"pretrain.max_steps={steps}", weights="{caption: 1}")
        made(recipe, force=True)
        moved = changed(recipe)
        assert any("language_model" in name for name in moved)
        assert any("vision_tower" in name for name in moved) == moves, steps


def test_heads_take_the_common_rate_and_a_missing_tower_is_named(recipe_at):
    from mmtune.training.learner import part_of

    assert part_of("heads.codes.autoencoder.encoders.audio.0.weight") == "heads"
    assert part_of("model.model.gate.bias") == part_of("model.media_attention.0.gate") == "fusion"
    assert part_of("model.model.language_model.layers.0.mlp.gate_proj.weight") == "llm"
    with pytest.raises(RecipeError, match=r"pretrain.train names the tower `audio`"):
        made(recipe_at("pretrain.train=[audio]", weights="{caption: 1}"))
