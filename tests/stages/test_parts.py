"""Parts that pretrain cannot join are named by their key; a sound encoder that reads (time, bands) is decoded right."""

import json

import pytest
import transformers as t

from mmtune.errors import RecipeError
from mmtune.recipe.text import load_recipe
from mmtune.stages.assemble import assemble_stage
from mmtune.stages.build_data import build_data
from mmtune.stages.pretrain import pretrain
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = """
run_dir: {folder}/run
sources:
  - id: sounds
    reader: table
    path: {data}/sounds/annotations/train.jsonl.gz
    columns: {{id: id, question: question, answer: answer, audio: audio}}
    audios: {data}/sounds/train
    limit: 8
pretrain:
  build:
    text: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
    tokenizer: {data}/base
    encoders: {{audio: {{hidden_size: 16, intermediate_size: 16, num_attention_heads: 2, num_mel_bins: 16}}}}
  max_steps: 2
  batch_rows: 4
  log_every: 1
"""


@pytest.fixture
def recipe_at(tmp_path, repository):
    def make(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(TEXT.format(folder=tmp_path, data=repository / "data"), "utf-8")
        return load_recipe(path, list(overrides), environ={})

    return make


def clip_processor():
    size = {"height": 28, "width": 28}
    return t.CLIPImageProcessor(size=size, crop_size=size)


@pytest.fixture
def folders(tmp_path):
    """Folders of encoders and language models that lack something, or are something else."""
    t.BertModel(t.BertConfig(**SMALL, vocab_size=60)).save_pretrained(tmp_path / "bert")
    clip_processor().save_pretrained(tmp_path / "bert")
    vision, text = {**SMALL, "image_size": 28, "patch_size": 7}, {**SMALL, "vocab_size": 60}
    t.CLIPVisionModel(t.CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "vision")
    t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "clip")
    t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, vocab_size=99, num_key_value_heads=2)).save_pretrained(tmp_path / "words")
    return tmp_path


def test_folders_that_are_no_part_are_named(recipe_at, folders):
    build = "pretrain.build"
    for overrides, said in (
        ([f"{build}.encoders={{image: {folders}/none}}"], r"encoders\.image: .*none is not there"),
        ([f"{build}.encoders={{image: {folders}/vision}}"], "no preprocessor_config.json of an image processor$"),
        ([f"{build}.encoders={{image: {folders}/bert}}"], "no encoder of image: BertModel takes input_ids"),
        ([f"{build}.encoders={{audio: {folders}/clip}}"], "no encoder of audio"),
        ([f"{build}.text={folders}/words", f"{build}.tokenizer=null"], "no tokenizer: there is no tokenizer.json$"),
        ([f"{build}.text={folders}/none", f"{build}.tokenizer=null"], r"build\.text: .*none is not there"),
        ([f"{build}.tokenizer={folders}/bert"], r"build\.tokenizer: .* has no tokenizer\.json"),
    ):
        with pytest.raises(RecipeError, match=said) as raised:
            assemble_stage(recipe_at(*overrides), console=Talk(quiet=True))
        assert raised.value.hint and "model.path" not in raised.value.hint, said
        assert len(raised.value.message) < 300


def test_configs_that_cannot_be_are_named(recipe_at):
    for value, said in (
        ("text={hidden_size: 64, num_attention_heads: 5}", r"text: .*not a multiple of the number of attention heads"),
        ("text={hidden_size: big}", r"text: .*hidden_size.* expected int"),
        ("encoders={image: {hidden_size: big}}", r"encoders\.image\.hidden_size: 'big'"),
        ("encoders={image: {patch_size: 0}}", r"encoders\.image\.patch_size: 0"),
        ("encoders={audio: {hidden_size: 30, num_attention_heads: 4}}", "hidden_size 30 is not a multiple"),
        ("encoders={image: {model_type: bert, hidden_size: 16, num_attention_heads: 2}}", "takes input_ids"),
    ):
        with pytest.raises(RecipeError, match=said):
            assemble_stage(recipe_at(f"pretrain.build.{value}"), console=Talk(quiet=True))


def test_spectra_of_time_by_bands_are_decoded_by_their_bands(recipe_at, tmp_path):
    t.ASTModel(t.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)).save_pretrained(tmp_path / "ast")
    t.ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path / "ast")
    recipe = recipe_at(
        f"pretrain.build.encoders={{audio: {tmp_path}/ast}}", "pretrain.objectives={caption: 1, reconstruction: 0.1}"
    )
    for stage in (build_data, assemble_stage, tokenize, pretrain):
        stage(recipe, console=Talk(quiet=True))
    lines = [json.loads(line) for line in (recipe.run_dir / "base" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["reconstruction_audio"] > 0 for line in lines)


def test_a_summary_holds_the_bands_over_time():
    import torch

    from mmtune.models.composite.encoded import EncodedMedia, summaries

    config = t.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)
    sound = torch.zeros(1, 64, 32)
    sound[0, :8, 3] = 1.0
    nothing = torch.zeros(1, dtype=torch.long)
    media = {"audio": EncodedMedia(torch.zeros(1, 4), nothing, nothing)}
    whole = type("Composite", (), {"audio_config": config})
    found = summaries(whole, {"input_features": sound}, media, 1)["audio"].view(32, 8)
    assert found[3, 0] == 1 and found.sum() == 1
