"""eval from official files to a page: a tiny Llava, real pictures, the real stages before it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from mmtune.errors import DataError, GateError, IntegrityError, RecipeError
from mmtune.recipe.text import load_recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.finetune import finetune
from mmtune.stages.tokenize import tokenize
from mmtune.storage import is_finished, read_manifest
from mmtune.talk import Talk

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = Talk(quiet=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A Llava of a few thousand random parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["red green blue yes no"] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    folder = tmp_path_factory.mktemp("model")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_vqa(folder: Path, split: str, count: int) -> None:
    """Plain coloured pictures and two questions on each, as official VQA files."""
    from PIL import Image

    questions, annotations = [], []
    colours = ["red", "green", "blue"]
    offset = {"train": 0, "val": 1000}[split]
    (folder / split).mkdir(parents=True)
    for index in range(count):
        image, colour = offset + index, colours[index % 3]
        Image.new("RGB", (24, 20), colour).save(folder / split / f"COCO_{split}_{image:012d}.jpg")
        for place, (text, answer, kind) in enumerate(
            [
                ("What <b>color</b> is it?", colour, "other"),
                ("Is it red?", "yes" if colour == "red" else "no", "yes/no"),
            ]
        ):
            number = image * 10 + place
            answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
            questions.append({"image_id": image, "question": text, "question_id": number})
            shared = {"image_id": image, "question_id": number, "multiple_choice_answer": answer, "answers": answers}
            annotations.append(
                {**shared, "answer_type": kind, "question_type": "what color" if place == 0 else "is it"}
            )
    (folder / f"{split}_q.json").write_text(json.dumps({"data_subtype": split, "questions": questions}))
    (folder / f"{split}_a.json").write_text(json.dumps({"data_subtype": split, "annotations": annotations}))


def recipe_for(folder: Path, model: Path, *overrides: str):
    lines = [
        "description: Colours <script>alert(1)</script>",
        "run_dir: run",
        "seed: 3",
        f"model: {{path: {model}}}",
        "sources:",
    ]
    for split in ("train", "val"):
        lines.append(
            f"  - {{id: colours, reader: vqa_v2, split: {split}, questions: {split}_q.json,"
            f" annotations: {split}_a.json, images: {split}}}"
        )
    lines += [
        "build: {workers: 1}",
        "tokenize: {max_length: 128, workers: 1}",
        "finetune: {max_steps: 30, batch_rows: 8, learning_rate: 1.0e-2, lora: {r: 4, alpha: 8}, precision: fp32}",
        "eval: {bootstrap: 200, max_new_tokens: 4, batch_rows: 5}",
    ]
    file = folder / "recipe.yaml"
    file.write_text("\n".join(lines) + "\n")
    return load_recipe(file, list(overrides))


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    """A finished run up to report/."""
    folder = tmp_path_factory.mktemp("run")
    write_vqa(folder, "train", 12)
    write_vqa(folder, "val", 6)
    recipe = recipe_for(folder, model_folder)
    for stage in (build_data, tokenize, finetune):
        stage(recipe, console=QUIET)
    return folder, recipe, evaluate(recipe, console=QUIET)


def test_report_folder_is_complete_and_speaks_of_the_same_rows(run):
    folder, _, result = run
    report = folder / "run" / "report"
    manifest = read_manifest(report, verify=True)
    assert {"metrics.json", "predictions.jsonl", "report.md", "index.html", "rejects.jsonl"} <= set(manifest.files)
    assert manifest.parents == {
        "instructions": read_manifest(folder / "run" / "instructions").hash,
        "adapter": read_manifest(folder / "run" / "adapter").hash,
    }
    rows = [json.loads(line) for line in (report / "predictions.jsonl").read_text().splitlines()]
    by_model = {name: [row["id"] for row in rows if row["model"] == name] for name in ("base", "tuned")}
    assert by_model["base"] == by_model["tuned"] and len(by_model["base"]) == result["rows"] == 12
    entry = result["metrics"]["vqa_accuracy"]
    for name in ("base", "tuned"):
        scores = [row["scores"]["vqa_accuracy"] for row in rows if row["model"] == name]
        assert entry["models"][name]["value"] == pytest.approx(sum(scores) / len(scores), abs=1e-3)
    assert entry["n"] == 12 and entry["media_groups"] == 6
    assert json.loads((report / "metrics.json").read_text())["metrics"] == result["metrics"]


def test_perplexity_is_that_of_the_training_loop(run):
    folder, _, result = run
    models = result["perplexity"]["models"]
    assert models["tuned"]["value"] < models["base"]["value"]
    # finetune measured the same answers of the same rows in another batching.
    val_loss = read_manifest(folder / "run" / "adapter").facts["val_loss"]
    assert math.log(models["tuned"]["value"]) == pytest.approx(val_loss, abs=1e-4)
    assert result["perplexity"]["n"] == 12


def test_page_is_inert_and_self_contained(run):
    folder, _, _ = run
    page = (folder / "run" / "report" / "index.html").read_text()
    assert "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'" in page
    assert "<script" not in page and "&lt;b&gt;color&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "url(" not in page
    assert page.count("data:image/png;base64,") >= 1
    assert '<svg class="plot"' in page


def test_again_is_cached_and_a_gate_does_not_cost_a_run(run):
    folder, recipe, result = run
    again = evaluate(recipe, console=QUIET)
    assert again["cached"] and again["metrics"] == result["metrics"]
    gated = load_recipe(folder / "recipe.yaml", ["eval.fail_under={vqa_accuracy: 100.5}"])
    with pytest.raises(GateError, match="vqa_accuracy of tuned"):
        evaluate(gated, console=QUIET)
    assert is_finished(folder / "run" / "report")


def test_dry_run_writes_nothing(run):
    folder, _, _ = run
    recipe = load_recipe(folder / "recipe.yaml", ["eval.split=train"])
    before = read_manifest(folder / "run" / "report").hash
    assert evaluate(recipe, dry_run=True, console=QUIET)["rows"] == 24
    assert read_manifest(folder / "run" / "report").hash == before


def test_base_alone_needs_no_adapter_and_long_rows_are_counted(run, tmp_path, monkeypatch):
    folder, _, _ = run
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "instructions").symlink_to(folder / "run" / "instructions")
    text = (folder / "recipe.yaml").read_text().replace("run_dir: run", f"run_dir: {tmp_path / 'run'}")
    (folder / "alone.yaml").write_text(text)
    sizes = ["eval.compare=[base]", "eval.loss=false", "eval.metrics=[exact_match, token_f1]"]
    console, titles = Talk(quiet=True), []
    monkeypatch.setattr(console, "table", lambda title, *_: titles.append(title))
    result = evaluate(load_recipe(folder / "alone.yaml", sizes), limit=7, console=console)
    assert titles[0] == "val, 7 rows, a sample of 12"
    assert result["rows"] == 7 and result["perplexity"] is None
    assert set(result["metrics"]) == {"exact_match", "token_f1"}
    assert "difference" not in result["metrics"]["exact_match"]
    with pytest.raises(DataError, match=r"no row can be asked.*too_long"):
        evaluate(load_recipe(folder / "alone.yaml", [*sizes, "tokenize.max_length=12"]), console=QUIET)
    with pytest.raises(DataError, match="adapter") as error:
        evaluate(load_recipe(folder / "alone.yaml"), console=QUIET)
    assert "mmtune finetune" in error.value.hint


def test_an_adapter_of_other_rows_is_told(run, tmp_path):
    folder, *_ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    moved = load_recipe(folder / "recipe.yaml", [f"run_dir={tmp_path / 'run'}", "eval.loss=false"])

    def notes(limit: int) -> list[str]:
        console = Talk(quiet=True)
        evaluate(moved, limit=limit, console=console)
        report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
        return [note for note in report["notes"] if "adapter/ was tuned on" in note and note in console.lines]

    assert notes(3) == []
    build_data(moved, limit=11, console=QUIET)
    learned = "it may have learned some of the rows of val that it is asked here."
    assert notes(4) == [f"adapter/ was tuned on other rows than instructions/ holds by now; {learned}"]
    tokenize(moved, console=QUIET)
    assert notes(5) == [f"adapter/ was tuned on tokens/ that were replaced since; {learned}"]
    shutil.rmtree(tmp_path / "run" / "tokens")
    assert notes(6) == []


def test_wrong_settings_are_named_before_a_model_is_loaded(run, model_folder, tmp_path):
    folder, _, _ = run
    with pytest.raises(RecipeError, match="unknown metric 'vqa_acuracy'") as error:
        evaluate(load_recipe(folder / "recipe.yaml", ["eval.metrics=[vqa_acuracy]"]), console=QUIET)
    assert "did you mean 'vqa_accuracy'" in error.value.hint
    with pytest.raises(RecipeError, match="scores are of 100"):
        evaluate(load_recipe(folder / "recipe.yaml", ["eval.fail_under={vqa_accuracy: 0.6}"]), console=QUIET)
    with pytest.raises(DataError, match="no rows in the split 'test'"):
        evaluate(load_recipe(folder / "recipe.yaml", ["eval.split=test"]), console=QUIET)
    with pytest.raises(IntegrityError, match="was tuned from"):
        evaluate(load_recipe(folder / "recipe.yaml", [f"model.path={tmp_path}"]), console=QUIET)


def test_a_base_that_moved_is_found_by_the_recipe_and_another_one_refused(run, model_folder, tmp_path, recwarn):
    folder, *_ = run
    shutil.copytree(folder / "run" / "instructions", tmp_path / "run" / "instructions")
    shutil.copytree(model_folder, tmp_path / "old")
    old, new = (
        load_recipe(folder / "recipe.yaml", [f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / name}"])
        for name in ("old", "new")
    )
    for stage in (tokenize, finetune):
        stage(old, console=QUIET)
    wanted = evaluate(old, console=QUIET)
    (tmp_path / "old").rename(tmp_path / "new")
    found = evaluate(new, console=QUIET)
    assert not found["cached"] and found["metrics"] == wanted["metrics"]
    assert not [str(one.message) for one in recwarn if str(tmp_path / "old") in str(one.message)]
    with pytest.raises(RecipeError, match=f"tuned from the model {tmp_path / 'old'}, which is not there") as gone:
        evaluate(new.model_copy(update={"model": None}), console=QUIET)
    assert "name where it is by now" in gone.value.hint
    weights = tmp_path / "new" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"than adapter/ was tuned from, which was {tmp_path}") as other:
        evaluate(new, console=QUIET)
    assert other.value.exit_code == 7 and "bring that one back or name it" in other.value.hint


def test_a_model_that_gives_no_numbers_is_an_integrity_error(tmp_path: Path, model_folder: Path):
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_vqa(tmp_path, "train", 3)
    write_vqa(tmp_path, "val", 3)
    recipe = recipe_for(tmp_path, model, "eval.compare=[base]")
    build_data(recipe, console=QUIET)
    with pytest.raises(IntegrityError, match=r"base gives probabilities that are no numbers for . of . rows"):
        evaluate(recipe, console=QUIET)
    assert not (recipe.run_dir / "report").exists()
