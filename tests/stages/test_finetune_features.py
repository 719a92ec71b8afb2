"""Features of frozen towers through the whole stage: equal numbers, towers that are not loaded, saved models whole."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtune.errors import IntegrityError
from mmtune.models import digest
from mmtune.models import load as loading
from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.finetune import finetune
from mmtune.stages.tokenize import tokenize
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from tests.stages.tuned import metrics_of, numbers_of
from tests.training.conftest import tiny

pytestmark = pytest.mark.usefixtures("own_precision")


def said(recipe: Recipe, **more: Any) -> str:
    console = Talk(quiet=True)
    finetune(recipe, force=True, console=console, **more)
    return "\n".join(console.lines)


def saved(recipe: Recipe) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (recipe.run_dir / "adapter").glob("*.safetensors")}


@pytest.fixture
def absent(monkeypatch: Any) -> list[set[str]]:
    """The names of the weights that each loading of a model left out."""
    seen: list[set[str]] = []
    load = loading.load_model

    def watched(*path: Any, **settings: Any) -> Any:
        model = load(*path, **settings)
        seen.append({name for name, parameter in model.named_parameters() if parameter.is_meta})
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": ["llm", "projector"]},
        {"method": "full"},
        {"method": "full", "train": ["projector"]},
        {"method": "prompt", "virtual_tokens": 4},
        {"quantize": "nf4"},
        {"precision": "bf16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "lora",
)
def test_the_second_run_does_not_load_the_tower_and_ends_with_the_same_bytes(fresh, settings, absent):
    if "quantize" in settings:
        pytest.importorskip("bitsandbytes", reason="nf4 is an extra: pip install mmtune[qlora]")
    recipe = fresh(**settings, max_steps=8)
    first = said(recipe)
    assert "features stand for pixels; the loss of a batch differs" in first and not absent[0]
    weights, numbers = saved(recipe), numbers_of(recipe)
    loads = len(absent)
    assert "the vision tower is not loaded" in said(recipe)
    left_out = absent[loads]
    assert any("vision_tower" in name for name in left_out)
    assert any("projector" in name for name in left_out) == ("projector" not in settings.get("train", ()))
    assert saved(recipe) == weights and numbers_of(recipe) == numbers
    live = fresh(**settings, features={"use": "off"}, max_steps=8)
    said(live)
    tolerance = 1e-3 if "precision" in settings else 1e-5
    assert numbers == [pytest.approx(row, rel=tolerance) for row in numbers_of(live)]


def test_a_model_tuned_without_its_tower_is_saved_with_it(fresh):
    recipe = fresh(method="full", max_steps=8)
    said(recipe)
    assert "not loaded" in said(recipe)
    base = load_file(Path(recipe.model.path) / "model.safetensors")
    tuned = load_file(recipe.run_dir / "adapter" / "model.safetensors")
    assert tuned.keys() == base.keys()
    assert all(torch.equal(tuned[name], base[name]) == ("language_model" not in name) for name in base)


@pytest.mark.parametrize("damage", ["touched", "gone", "one bit", "other weights", "no proof"])
def test_what_changed_since_the_proof_is_proved_again(fresh, damage, tmp_path):
    recipe = fresh(max_steps=8)
    said(recipe)
    folder = recipe.run_dir / "features" / "towers" / "image"
    (shard,) = folder.glob("shard-*")
    whole = shard.read_bytes()
    if damage == "one bit":
        shard.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:])
    elif damage == "touched":
        shard.write_bytes(shard.read_bytes())
    elif damage == "gone":
        shard.unlink()
    elif damage == "other weights":
        proof = folder / "proof.json"
        proof.write_text(proof.read_text().replace('weights\\": \\"', 'weights\\": \\"0'))
    else:
        (folder / "proof.json").write_text("[1, 2")
    assert "features stand for pixels; the loss of a batch differs" in said(recipe)
    # Where a batch that was not compared shows it, a damaged one would train on.
    assert shard.read_bytes() == whole
    assert "the vision tower is not loaded" in said(recipe)


MADE = "features stand for pixels; the loss of a batch differs"
NOT_LOADED = "the vision tower is not loaded"


@pytest.fixture
def pictures(tmp_path: Path, tiny_vlm: Path) -> Any:
    """A function from settings to a recipe over eight pictures and a model that a test may change."""
    model, rows = tmp_path / "model", []
    shutil.copytree(tiny_vlm, model)
    for number in range(8):
        picture(tmp_path / f"{number}.png", number)
        rows += [{"q": word, "a": str(number), "image": f"{number}.png"} for word in ("How many?", "Where is it?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "image": "image"}
    source = Source(id="s", reader="table", path=str(tmp_path / "rows.jsonl"), images=str(tmp_path), columns=columns)
    common = {"batch_rows": 16, "max_steps": 6, "learning_rate": 0.01, "log_every": 1, "lora": {"r": 2}}

    def make(**settings: Any) -> Recipe:
        wish = Finetune.model_validate({**common, **settings})
        return Recipe(run_dir=tmp_path, model=Model(path=str(model)), sources=(source,), finetune=wish)

    build_data(make(), console=Talk(quiet=True))
    tokenize(make(), console=Talk(quiet=True))
    return make


def picture(path: Path, seed: int) -> None:
    """Writes a picture whose file is as long as that of any other seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)


def as_live(pictures: Any, numbers: Any) -> None:
    """Checks that the numbers are those of a run on the pictures themselves."""
    live = pictures(features={"use": "off"})
    said(live)
    assert numbers == [pytest.approx(row, rel=1e-5) for row in numbers_of(live)]


def test_a_picture_that_changed_has_its_features_made_again(pictures, tmp_path):
    recipe = pictures()
    assert MADE in said(recipe) and NOT_LOADED in said(recipe)
    before, size = numbers_of(recipe), (tmp_path / "3.png").stat().st_size
    picture(tmp_path / "3.png", 99)
    assert (tmp_path / "3.png").stat().st_size == size
    assert MADE in said(recipe)
    after = numbers_of(recipe)
    assert after != before
    as_live(pictures, after)
    assert NOT_LOADED in said(recipe)


def test_another_processor_has_all_features_made_again(pictures, tmp_path):
    recipe = pictures()
    said(recipe)
    before, changed = numbers_of(recipe), 0
    for file in (tmp_path / "model").glob("*processor*_config.json"):
        text = json.loads(file.read_text())
        own = text.get("image_processor", text)
        if "image_mean" in own:
            own["image_mean"], changed = [0.1, 0.2, 0.3], changed + 1
            file.write_text(json.dumps(text))
    assert changed
    with pytest.raises(IntegrityError, match="the processor is not the one that tokens/ was made with"):
        said(recipe)
    tokenize(recipe, console=Talk(quiet=True))
    assert MADE in said(recipe)
    after = numbers_of(recipe)
    assert after != before
    as_live(pictures, after)


@pytest.mark.parametrize("large", [False, True], ids=["small", "as a large file"])
def test_a_base_whose_projector_alone_changed_is_another_base(pictures, tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr(digest, "_SMALL", 0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = pictures()
    said(recipe)
    before = numbers_of(recipe)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith("multi_modal_projector.linear_2.bias"))
    weights[name] += 0.5
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"made with other settings or data: config\.weights: "):
        finetune(recipe, console=Talk(quiet=True))
    assert MADE in said(recipe)
    after = numbers_of(recipe)
    assert after != before
    as_live(pictures, after)


def test_a_tower_that_was_left_out_comes_back_where_features_are_not_worth_it(fresh):
    said(fresh(max_steps=8))
    short = fresh(max_steps=3)
    told = said(short)
    assert "stand for" not in told and "it goes on without them; features pay where images are seen 1.5 times" in told
    weights = saved(short)
    said(fresh(max_steps=3, features={"use": "off"}))
    assert saved(short) == weights


def test_two_processes_leave_the_tower_out_together(fresh, two):
    for line in ("features stand for pixels; the loss", "the vision tower is not loaded"):
        recipe = fresh(max_steps=8)
        child = two(max_steps=8)
        _, talk = child.communicate(timeout=200)
        assert child.returncode == 0 and line in " ".join(talk.split()), talk[-3000:]
        weights = saved(recipe)
        (recipe.run_dir / "adapter" / "manifest.json").unlink()
        for file in (recipe.run_dir / "adapter").iterdir():
            file.unlink()
        (recipe.run_dir / "adapter").rmdir()
    assert weights


@pytest.fixture
def sounds(tmp_path: Path) -> Any:
    """A function from settings to a recipe of questions about eight sounds, three each."""
    family = tiny("qwen2_audio")
    family.model.save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    rows = []
    for number in range(8):
        samples = (np.random.default_rng(number).standard_normal(4000 + 900 * number) * 3000).astype("<i2")
        with wave.open(str(tmp_path / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
        words = ("How many?", "What colour is the cat?", "Where is it?")
        rows += [{"q": word, "a": f"{number} {word}", "sound": f"{number}.wav"} for word in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "audio": "sound"}
    source = Source(id="s", reader="table", path=str(tmp_path / "rows.jsonl"), audios=str(tmp_path), columns=columns)
    common = {"batch_rows": 12, "max_steps": 6, "learning_rate": 0.01, "log_every": 1, "lora": {"r": 2}}

    def make(**settings: Any) -> Recipe:
        wish = Finetune.model_validate({**common, **settings})
        return Recipe(run_dir=tmp_path, model=Model(path=str(tmp_path / "model")), sources=(source,), finetune=wish)

    build_data(make(), console=Talk(quiet=True))
    tokenize(make(), console=Talk(quiet=True))
    return make


@pytest.mark.parametrize("settings", [{}, {"method": "full", "train": ["llm", "projector"]}], ids=["lora", "full"])
def test_sounds_train_as_they_do_live(sounds, settings):
    recipe = sounds(**settings)
    talk = said(recipe)
    assert "features of 8 sounds" in talk and "features stand for sounds" in talk
    numbers, weights = numbers_of(recipe), saved(recipe)
    assert "the audio tower is not loaded" in said(recipe) and saved(recipe) == weights
    said(sounds(**settings, features={"use": "off"}))
    assert numbers == [pytest.approx(row, rel=1e-5) for row in numbers_of(recipe)]
    assert len(metrics_of(recipe)) == 6 and read_manifest(recipe.run_dir / "adapter").facts["steps"] == 6
