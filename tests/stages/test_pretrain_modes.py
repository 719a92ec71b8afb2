"""Every mode and attention of fusion from bundled pictures, sounds and clips to a base that is tuned and scored."""

import gzip
import json
import shutil
from itertools import islice

import pytest
import torch
from accelerate.state import AcceleratorState

from mmtune.errors import Interrupted
from mmtune.order import run_stages, stages_of
from mmtune.recipe.text import load_recipe
from mmtune.stages.export import export
from mmtune.stages.finetune import finetune
from mmtune.stages.pretrain import pretrain
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from mmtune.training import loop

pytestmark = pytest.mark.slow

SOURCES = """
  - id: scenes
    reader: vqa_v2
    split: {split}
    questions: {data}/scenes/annotations/compare_{split}_questions.json
    annotations: {data}/scenes/annotations/compare_{split}_annotations.json
    images: {data}/scenes/{split}
    limit: {rows}
  - id: sounds
    reader: table
    split: {split}
    path: {folder}/sounds_{split}.jsonl
    columns: {{id: id, question: question, answer: answer, audio: audio, images: image}}
    audios: {data}/sounds/{split}
    images: {data}/scenes/{split}
    template: vqa_plain
  - id: clips
    reader: table
    split: {split}
    path: {data}/clips/annotations/{split}.jsonl.gz
    columns: {{id: id, question: question, answer: answer, video: video}}
    videos: {data}/clips/{split}
    template: vqa_plain
    limit: {rows}
"""
TEXT = """
run_dir: {folder}/run
sources:
{sources}
tokenize: {{max_length: 512, video_frames: 3}}
pretrain:
  build:
    text: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2}}
    tokenizer: {data}/base
    encoders:
      image: {{hidden_size: 16, num_attention_heads: 2, intermediate_size: 16, num_hidden_layers: 1, image_size: 24,
        patch_size: 12}}
      audio: {{hidden_size: 16, num_attention_heads: 2, intermediate_size: 16, num_hidden_layers: 1, num_mel_bins: 16,
        sampling_rate: 8000, n_fft: 200, hop_length: 80}}
    projectors: {projectors}
    fusion: {fusion}
  objectives: {objectives}
  codes: {{width: 8}}
  max_steps: 4
  batch_rows: 24
  log_every: 1
finetune:
  lora: {{r: 2}}
  features: {{use: {features}}}
  max_steps: 2
  batch_rows: 6
  learning_rate: 0.01
  log_every: 1
eval: {{split: test, compare: [base, tuned], max_new_tokens: 3, bootstrap: 100}}
"""
ALL = "{caption: 1, reconstruction: 0.1, adversarial: 0.05, contrastive: 0.1, masked: 0.2, match: 0.2}"
CODED = "{caption: 1, reconstruction: 0.1, adversarial: 0.05, contrastive: 0.1}"
MLP = "{image: {kind: linear}, audio: {kind: mlp}}"
RESAMPLED = "{image: {kind: qformer, queries: 4, heads: 2, layers: 1, instruction: true},"
RESAMPLED += " audio: {kind: perceiver, queries: 4, heads: 2, layers: 1, instruction: true}}"
WAYS = {
    "early": ("{}", MLP, ALL),
    "self": ("{attention: self}", MLP, ALL),
    "cross": ("{attention: cross, layers: [0, 1]}", MLP, ALL),
    "co": ("{attention: co, layers: [0, 1]}", MLP, ALL),
    "late": ("{mode: late, instruction: true}", MLP, CODED),
    "hybrid": ("{mode: hybrid, instruction: true, modality_dropout: 0.2}", MLP, CODED),
    "hybrid_co": ("{mode: hybrid, attention: co, layers: [0, 1]}", MLP, CODED),
    "late_self": ("{mode: late, attention: self}", MLP, CODED),
    "resampled": ("{mode: hybrid}", RESAMPLED, CODED),
}


@pytest.fixture(scope="module", params=WAYS)
def ran(request, tmp_path_factory, repository):
    """The recipe of a way to fuse, all of its stages run, and what was said."""
    AcceleratorState._reset_state()
    folder = tmp_path_factory.mktemp(request.param)
    fusion, projectors, objectives = WAYS[request.param]
    data = repository / "data"
    sources = ""
    for split, rows in (("train", 12), ("test", 4)):
        sources += SOURCES.format(split=split, data=data, folder=folder, rows=rows)
        # Four questions about each sound, one of them with a picture.
        with gzip.open(data / "sounds" / "annotations" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            (folder / f"sounds_{split}.jsonl").write_text("".join(islice(file, 2 * rows)), "utf-8")
    path = folder / "recipe.yaml"
    # A resampler that reads the question runs at every step; elsewhere features stand for media.
    features = "off" if projectors == RESAMPLED else "on"
    own = {"fusion": fusion, "projectors": projectors, "objectives": objectives, "features": features}
    path.write_text(TEXT.format(folder=folder, data=data, sources=sources, **own), "utf-8")
    recipe, console = load_recipe(path, [], environ={}), Talk(quiet=True)
    run_stages(recipe, stages_of(recipe, None, True), force=False, dry_run=False, console=console)
    return request.param, recipe, console.lines


def test_from_sources_to_scores(ran):
    way, recipe, _ = ran
    lines = [json.loads(line) for line in (recipe.run_dir / "base" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        total = sum(weight * line[f"loss_{name}"] for name, weight in recipe.pretrain.weights.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    # Pictures, sounds and the frames of clips have codes; some rows have a picture and a sound.
    assert {"code_variance_image", "code_variance_audio", "reconstruction_image", "reconstruction_audio"} <= set(
        lines[0]
    )
    paired = {"cross_audio_image", "fill_error_audio_image", "recall_audio_image"}
    assert any(paired <= set(line) and line["loss_contrastive"] > 0 for line in lines)
    mixes = recipe.pretrain.build.fusion.mode != "early"
    for stage in ("base", "adapter"):
        logged = set().union(*losses(recipe.run_dir / stage))
        assert ({"loss_mixture", "loss_alone_image", "loss_alone_audio"} <= logged) == mixes, stage
    if "masked" in recipe.pretrain.weights:
        assert ("masked_image" in lines[0]) == (way != "cross")
    report = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    assert report["rejected"] == {} and report["n"] == 16
    made_from = [made["folder"] for made in report["manifests"]]
    assert made_from == ["instructions", "start", "tokens", "base", "adapter"]
    for metric in report["metrics"].values():
        assert set(metric["models"]) == {"base", "tuned"}
    adapter = read_manifest(recipe.run_dir / "adapter")
    assert adapter.facts["model"] == str(recipe.run_dir / "base") and adapter.facts["steps"] == 2
    assert ("mixture" in report["training"].get("parts of that loss", "")) == mixes


@pytest.mark.parametrize("made", ["base", "exported"])
def test_base_and_exported_model_are_transformers_own(ran, made):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, recipe, _ = ran
    if made == "exported":
        console = Talk(quiet=True)
        result = export(recipe, console=console)
        assert "mmtune_composite by itself" in console.lines[0] and "register()" in console.lines[0]
        assert result["difference"] < 1e-5 and result["change"] > 100 * result["difference"], result
    base = str(recipe.run_dir / made)
    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
    from PIL import Image

    parts = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    sound = torch.zeros(4000).numpy()
    made = processor(text=text, images=[Image.new("RGB", (40, 30))], audio=[sound], return_tensors="pt")
    given = {name: value for name, value in made.items() if name not in processor.unused_input_names}
    found = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert found.shape[0] == 1 and found.shape[1] > made["input_ids"].shape[1]


def test_a_prefix_is_shared_where_media_do_not_read_the_question(ran):
    way, _, said = ran
    trees = any("rows that share media train as one tree" in line for line in said)
    apart = any("each row trains apart" in line for line in said)
    reads = way in ("self", "co", "hybrid_co", "late_self", "resampled")
    assert (apart, trees) == (reads, not reads), said


def test_a_stopped_run_goes_on_with_the_same_losses(ran, monkeypatch):
    """Of hybrid fusion each branch's own one too, in pretrain and finetune."""
    way, recipe, _ = ran
    if way != "hybrid":
        pytest.skip("one way stands for all")
    for stage, run in (("base", pretrain), ("adapter", finetune)):
        folder, asked = recipe.run_dir / stage, iter([True])
        weights = next(folder.glob("*model.safetensors"))
        whole, metrics = weights.read_bytes(), losses(folder)
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "stop_wanted", lambda _, asked=asked: next(asked, False))
            with pytest.raises(Interrupted):
                run(recipe, console=Talk(quiet=True))
        run(recipe, console=Talk(quiet=True))
        assert weights.read_bytes() == whole
        assert losses(folder) == metrics and any("loss_alone_image" in line for line in metrics)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("loss", "val_loss"))} for line in lines]
