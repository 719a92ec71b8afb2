"""The finetune stage on bundled scenes: settings reach the run, and all ways to train end alike."""

import json
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load, load_file

from mmtune.errors import CapabilityError, DivergedError, Interrupted
from mmtune.models.load import load_tuned
from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.finetune import finetune
from mmtune.stages.tokenize import tokenize
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from mmtune.training import cross_entropy, tree_kernels
from tests.stages.tuned import left_by, metrics_of, numbers_of, stopped_and_resumed, weights_of
from tests.training import flex_kernel

pytestmark = pytest.mark.usefixtures("own_precision")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ia3"},
        {"method": "prompt", "virtual_tokens": 4, "neftune_alpha": 5},
        {"method": "full", "train": ["llm", "vision", "projector"], "tower_rates": {"vision": 1e-3}},
        {"lora": {"r": 2, "dora": True, "rslora": True, "plus_ratio": 16}, "train": ["llm", "vision"]},
        {"lora": {"r": 2, "init": "pissa"}},
        {"precision": "bf16", "checkpointing": True, "neftune_alpha": 5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_method_goes_from_recipe_to_adapter(fresh, settings):
    recipe = fresh(**settings)
    result = finetune(recipe, console=Talk(quiet=True))
    assert result["steps"] == 3 and len(metrics_of(recipe)) == 3
    facts = read_manifest(recipe.run_dir / "adapter").facts
    assert facts["eos_token_ids"] and 0 <= facts["wait_share"] <= facts["overhead_share"] <= 1
    assert {tower for tower, row in facts["towers"].items() if row["trainable"]} == set(recipe.finetune.train)
    load_tuned(recipe.model.path, recipe.run_dir / "adapter")


def test_features_train_as_pixels_do_and_are_made_once(fresh):
    live = fresh(features={"use": "off"}, max_steps=8)
    finetune(live, console=Talk(quiet=True))
    assert not (live.run_dir / "features").exists()
    expected, weights = numbers_of(live), weights_of(live)
    console = Talk(quiet=True)
    kept = fresh(max_steps=8)
    finetune(kept, force=True, console=console)
    said = "\n".join(console.lines)
    assert "features stand for pixels" in said and "the frozen vision tower runs 12 times" in said
    (shard,) = (kept.run_dir / "features" / "towers" / "image").glob("shard-*")
    made = shard.stat().st_mtime_ns
    assert numbers_of(kept) == [pytest.approx(row, rel=1e-5) for row in expected]
    again = weights_of(kept)
    finetune(kept, force=True, console=Talk(quiet=True))
    assert shard.stat().st_mtime_ns == made and weights_of(kept) == again
    found, other = load(again), load(weights)
    assert all(torch.allclose(found[name], other[name], rtol=1e-3, atol=1e-5) for name in other)


def files_opened(monkeypatch):
    import mmtune.media.load as load

    opened, real = [], load.load_image
    monkeypatch.setattr(load, "load_image", lambda root, medium: opened.append(medium.path) or real(root, medium))
    return opened


def test_processed_images_on_disk_train_as_the_files_do(fresh, monkeypatch):
    opened = files_opened(monkeypatch)
    both = {"train": ["llm", "vision"], "max_steps": 8}
    live = fresh(**both)
    finetune(live, console=Talk(quiet=True))
    expected, weights, images = numbers_of(live), weights_of(live), len(set(opened))
    assert not (live.run_dir / "features").exists()
    console, kept = Talk(quiet=True), fresh(**both, pixels_gib=1)
    # Another room is no other run.
    assert finetune(kept, console=Talk(quiet=True))["cached"]
    finetune(kept, force=True, console=console)
    said = "\n".join(console.lines)
    assert f"{images} of {images} images, processed, take" in said and f"{images} of them are made now" in said
    assert numbers_of(kept) == expected and weights_of(kept) == weights
    opened.clear()
    finetune(kept, force=True, console=(console := Talk(quiet=True)))
    # One, to know what an image takes.
    assert len(opened) == 1 and any(" 0 of them are made now" in line for line in console.lines)
    assert weights_of(kept) == weights
    size = sum(file.stat().st_size for file in (kept.run_dir / "features" / "pixels").iterdir())
    for _ in range(2):
        opened.clear()
        finetune(fresh(**both, pixels_gib=size / 2 / (1 << 30)), force=True, console=(console := Talk(quiet=True)))
    assert any(re.search(rf"[1-9]\d* of {images} images, processed", line) for line in console.lines)
    assert 1 < len(set(opened)) < images and weights_of(kept) == weights


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"augment": {"shift": 0.1}}, "finetune.augment changes the pixels"),
        ({"pixels_gib": 1e-9}, "there is no room for one"),
    ],
    ids=["augment", "no room"],
)
def test_processed_images_stay_away_with_a_note(fresh, settings, reason):
    console = Talk(quiet=True)
    recipe = fresh(**{"pixels_gib": 1, "train": ["llm", "vision"], **settings})
    finetune(recipe, console=console)
    assert any(f"no processed images are kept: {reason}" in line for line in console.lines)
    assert not (recipe.run_dir / "features").exists()


def test_rows_of_many_lengths_are_packed_and_train_as_they_do_apart(tmp_path, repository, tiny_vlm, monkeypatch):
    from mmtune.stages.finetune import batches

    table = tmp_path / "rows.jsonl"
    rows = [{"q": " ".join(["left"] * (1 + 3 * k)), "a": "yes" if k % 2 else "no"} for k in range(16)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(id="text", reader="table", path=str(table), columns={"question": "q", "answer": "a"})
    # One batch holds all rows, so that both ways see the same ones in every step.
    settings = {"batch_rows": 16, "max_steps": 3, "learning_rate": 0.01, "log_every": 1, "lora": {"r": 2}}
    recipe = Recipe(
        run_dir=tmp_path, model=Model(path=str(tiny_vlm)), sources=(source,), finetune=Finetune.model_validate(settings)
    )
    build_data(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    found = {}
    for least, said in ((0.1, True), (1.0, False)):
        monkeypatch.setattr(batches, "_LEAST_PADDING", least)
        console = Talk(quiet=True)
        finetune(recipe, force=True, console=console)
        assert any("less padding" in line for line in console.lines) == said
        found[said] = numbers_of(recipe)
    assert found[True] == [pytest.approx(row, rel=1e-4) for row in found[False]]


def test_rows_train_apart_with_a_note_where_trees_are_refused(fresh, monkeypatch):
    from mmtune.stages.finetune import batches
    from mmtune.training import batching
    from mmtune.training.tree_check import TreeCheck

    plain = fresh(features={"use": "off"})
    finetune(plain, console=Talk(quiet=True))
    expected = weights_of(plain)
    monkeypatch.setattr(batches, "_LEAST_PADDING", -1.0)
    refused = TreeCheck(False, 0.0, 0.5, 1e-4, "gradients differ by 5.0e-01, of 1")
    monkeypatch.setattr(batching, "check_trees", lambda *_, **__: refused)
    console = Talk(quiet=True)
    finetune(plain, force=True, console=console)
    (line,) = [line for line in console.lines if "each row trains apart" in line]
    assert "gradients differ by 5.0e-01" in line
    assert weights_of(plain) == expected


@pytest.mark.parametrize(
    ("settings", "near"), [({"checkpointing": True}, 1e-4), ({"method": "full", "precision": "bf16"}, 0.05)], ids=str
)
def test_flex_attention_trains_the_same_trees_in_one_row(fresh, monkeypatch, settings, near):
    from mmtune.stages.finetune import batches

    monkeypatch.setattr(batches, "_LEAST_PADDING", -1.0)
    recipe = fresh(**settings, batch_rows=None, batch_tokens=65536, features={"use": "off"})
    finetune(recipe, console=Talk(quiet=True))
    expected = numbers_of(recipe)
    flex_kernel.by_hand(monkeypatch)
    monkeypatch.setattr(tree_kernels, "kernels_to_try", lambda model, asked, device_type: ("flex_attention", "sdpa"))
    # As with a large vocabulary, whose head runs over some of the label tokens at a time.
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 4000)
    console = Talk(quiet=True)
    AcceleratorState._reset_state()
    finetune(recipe, force=True, console=console)
    assert any("by flex_attention" in line for line in console.lines), console.lines
    for found, wanted in zip(numbers_of(recipe), expected, strict=True):
        assert found == pytest.approx(wanted, rel=near)


def test_flex_attention_is_refused_on_a_cpu(fresh):
    recipe = fresh()
    asked = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attn": "flex_attention"})})
    if torch.cuda.is_available():
        pytest.skip("it runs on this machine")
    with pytest.raises(CapabilityError, match="no backward pass"):
        finetune(asked, console=Talk(quiet=True))


def test_full_tuning_on_features_saves_the_whole_model(fresh):
    recipe = fresh(method="full", features={"use": "on", "dtype": "bf16"})
    finetune(recipe, console=Talk(quiet=True))
    tuned = load_tuned(recipe.model.path, recipe.run_dir / "adapter")
    assert not any(parameter.is_meta for parameter in tuned.parameters())


@pytest.mark.parametrize("settings", [{"augment": {"shift": 0.1}}, {"method": "full", "train": ["llm", "vision"]}])
def test_no_features_are_kept_where_pixels_or_towers_change(fresh, settings):
    console = Talk(quiet=True)
    finetune(fresh(**settings, max_steps=1), console=console)
    assert not any("features of" in line for line in console.lines)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit", "lora": {"r": 32}},
        {"optimizer": "muon", "method": "full"},
        {"workers": 2, "lora": {"r": 2, "dropout": 0.2}, "neftune_alpha": 5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(fresh, settings, monkeypatch):
    if "8bit" in settings.get("optimizer", ""):
        pytest.importorskip("bitsandbytes", reason="adamw_8bit is an extra: pip install mmtune[qlora]")
    recipe = fresh(**settings, max_steps=5, log_every=2)
    finetune(recipe, console=Talk(quiet=True))
    weights, losses = left_by(recipe)
    assert any("resuming after step 3" in line for line in stopped_and_resumed(recipe, monkeypatch))
    again, numbers = left_by(recipe)
    assert again == weights
    assert numbers == losses


@pytest.mark.parametrize("settings", [{}, {"method": "full", "train": ["llm", "vision"]}], ids=["lora", "full"])
def test_resting_in_the_memory_of_the_cpu_changes_nothing(fresh, settings, monkeypatch):
    from torch.distributed.tensor import DTensor

    from mmtune.training import loop

    name = "model.safetensors" if settings else "adapter_model.safetensors"
    recipe = fresh(**settings, max_steps=4)
    finetune(recipe, console=Talk(quiet=True))
    expected, numbers = load_file(recipe.run_dir / "adapter" / name), numbers_of(recipe)
    accumulate, seen, asked = loop.Loop.accumulate, [], loop.Loop.stop_wanted

    def watch(run, chosen):
        seen.append(sum(isinstance(parameter, DTensor) for parameter in run.model.parameters()))
        return accumulate(run, chosen)

    # Stopped after two steps while it rests there, ended without.
    monkeypatch.setattr(loop.Loop, "accumulate", watch)
    polls = iter([False, True])
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
    resting = fresh(**settings, max_steps=4, offload=True)
    try:
        with pytest.raises(Interrupted):
            finetune(resting, force=True, console=Talk(quiet=True))
    finally:
        torch.distributed.destroy_process_group()
    assert seen[0] > 10
    monkeypatch.setattr(loop.Loop, "stop_wanted", asked)
    finetune(recipe, force=True, console=Talk(quiet=True))
    assert seen[-1] == 0
    found = load_file(recipe.run_dir / "adapter" / name)
    assert numbers_of(recipe) == [pytest.approx(row, rel=1e-5) for row in numbers]
    assert found.keys() == expected.keys()
    # The gradient of a key's bias is rounding alone, which Adam's step makes as large as any other; so is, nearly, that
    # of one weight in ten thousand.
    moved = {key: value for key, value in expected.items() if not key.endswith("k_proj.bias")}
    assert all(torch.allclose(found[key], value, rtol=1e-5, atol=1e-5) for key, value in moved.items())


def test_a_resumed_run_needs_no_room_for_features_that_are_there(fresh, monkeypatch):
    recipe = fresh(max_steps=8)
    finetune(recipe, console=Talk(quiet=True))
    full = shutil.disk_usage(recipe.run_dir)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    console = Talk(quiet=True)
    finetune(recipe, force=True, console=console)
    assert any("features stand for pixels" in line for line in console.lines)
    shutil.rmtree(recipe.run_dir / "features")
    console = Talk(quiet=True)
    finetune(recipe, force=True, console=console)
    assert any("free" in line and "needed" in line for line in console.lines)


def test_a_family_that_refuses_features_trains_on_pixels(fresh, monkeypatch):
    from mmtune.training import frozen_features

    def fail(self, items, expected):
        raise AttributeError("no such output")

    monkeypatch.setattr(frozen_features.Maker, "make", fail)
    console = Talk(quiet=True)
    assert finetune(fresh(max_steps=8), console=console)["steps"] == 8
    assert any("runs at every step: no such output" in line for line in console.lines)


def test_features_beyond_the_wish_stay_away(fresh):
    console = Talk(quiet=True)
    recipe = fresh(features={"most_gib": 1e-6}, max_steps=8)
    finetune(recipe, console=console)
    assert any("most_gib" in line for line in console.lines)
    assert not (recipe.run_dir / "features").exists()


def test_trackers_get_the_metrics(fresh):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'mmtune[trackers]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = fresh(trackers=["tensorboard"])
    finetune(recipe, console=Talk(quiet=True))
    files = list((recipe.run_dir / "trackers").rglob("events.out.*"))
    assert files
    losses = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        if "loss" in events.Tags()["scalars"]:
            losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in metrics_of(recipe)}, rel=1e-6)


def test_a_run_that_diverges_leaves_its_checkpoint_and_nothing_else(fresh):
    recipe = fresh(method="full", learning_rate=10, max_steps=60, save_every=1, warmup=0, clip=None, beta2=0.01)
    with pytest.raises(DivergedError, match=r"examples: compare/.*last good checkpoint: .*step-000000"):
        finetune(recipe, console=Talk(quiet=True))
    assert not (recipe.run_dir / "adapter").exists()
    for folder in (recipe.run_dir / "checkpoints" / "finetune").iterdir():
        weights = load_file(folder / "trainable.safetensors")
        assert all(bool(value.isfinite().all()) for value in weights.values())


# On two processes, through the command line.
