"""export: what stands in exported/ is the tuned model, by transformers alone, and nothing stands there that is not."""

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.encoding.processor import load_processor
from mmtune.errors import DataError, IntegrityError, RecipeError, ResourceError
from mmtune.models import merged as merging
from mmtune.models.load import load_tuned
from mmtune.order import early_end, stages_of
from mmtune.recipe import Model, Recipe
from mmtune.recipe.export import Export
from mmtune.records import SOFT_ID
from mmtune.stages.export import _own_dtype, export
from mmtune.stages.export.proof import Proof, losses_of, prove, rows_of
from mmtune.stages.finetune import finetune
from mmtune.stages.show import describe, render
from mmtune.storage import open_split, read_manifest
from mmtune.storage.manifest import write_manifest
from mmtune.talk import Talk
from mmtune.training.data import RowBatches

QUIET = Talk(quiet=True)
METHODS = {
    "lora": {"lora": {"r": 2}},
    "rslora of all towers": {"lora": {"r": 2, "rslora": True}, "train": ["llm", "projector", "vision"]},
    "dora": {"lora": {"r": 2, "dora": True}},
    "pissa": {"lora": {"r": 2, "init": "pissa"}},
    "ia3": {"method": "ia3"},
    "full": {"method": "full", "learning_rate": 1e-3},
}
pytestmark = pytest.mark.usefixtures("own_precision")


def batch_of(recipe):
    tokens = recipe.run_dir / "tokens"
    root = read_manifest(tokens).facts["media_root"]
    rows = rows_of(tokens, "train", 5, load_processor(str(recipe.run_dir / "adapter")), root)
    (batch,) = rows
    assert rows.count == len(batch["labels"]) == 5
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("method", METHODS)
def test_transformers_alone_loads_the_tuned_model(fresh, method):
    recipe = fresh(**METHODS[method])
    finetune(recipe, console=QUIET)
    result = export(recipe, console=QUIET)
    folder = recipe.run_dir / "exported"
    own = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert isinstance(own, torch.nn.Module) and not hasattr(own, "peft_config")
    batch = batch_of(recipe)
    with torch.no_grad():
        wanted = load_tuned(str(recipe.model.path), recipe.run_dir / "adapter")(**batch).logits
        found = own(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert result["change"] > 1e-3 > 100 * result["difference"]
    assert result["tokens"] > result["rows"] == 12 and result["dtype"] == "fp32" and not result["cached"]
    given = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which one?"}]}]
    tuned = AutoProcessor.from_pretrained(recipe.run_dir / "adapter")
    assert given.apply_chat_template(messages) == tuned.apply_chat_template(messages)


@pytest.fixture
def tuned(fresh):
    recipe = fresh()
    finetune(recipe, console=QUIET)
    return recipe


def test_fewer_bits_and_what_they_lose(tuned):
    whole = export(tuned, console=QUIET)
    assert export(tuned, console=QUIET)["cached"]
    shown = render(describe(tuned.run_dir / "exported")).splitlines()
    assert [line.split() for line in shown if line.startswith("rows")] == [["rows", "12"]]
    half = export(tuned.model_copy(update={"export": Export(dtype="bf16", rows=3)}), console=QUIET)
    folder = tuned.run_dir / "exported"
    config = json.loads((folder / "config.json").read_text())
    assert {part["dtype"] for part in (config, config["text_config"], config["vision_config"])} == {"bfloat16"}
    assert (
        half["difference"] > 10 * whole["difference"]
        and half["rows"] == 3
        and half["parameters"] == whole["parameters"]
    )
    weights = (folder / "model.safetensors").stat().st_size
    assert 2 * half["parameters"] < weights < 2.2 * half["parameters"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp32"), (None, "fp32")],
)
def test_weights_are_kept_as_the_base_keeps_them(tiny_vlm, tmp_path, said, kept):
    config = {**json.loads((tiny_vlm / "config.json").read_text()), "dtype": said}
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value}))
    assert _own_dtype(str(tmp_path), None, True) == kept


def test_generation_stops_where_the_tuned_model_does(tuned, monkeypatch):
    def read(folder, **given):
        found = read_manifest(folder, **given)
        return replace(found, facts={**found.facts, "eos_token_ids": [2, 5]}) if folder.name == "adapter" else found

    monkeypatch.setattr("mmtune.stages.export.read_manifest", read)
    export(tuned, console=QUIET)
    own = AutoModelForImageTextToText.from_pretrained(tuned.run_dir / "exported")
    assert own.generation_config.eos_token_id == [2, 5]


def test_a_model_that_answers_otherwise_is_not_written(tuned, monkeypatch):
    monkeypatch.setattr(merging, "merged", lambda model: model.unload())
    with pytest.raises(IntegrityError, match="off the tuned one, and tuning changed it by") as error:
        export(tuned, console=QUIET)
    assert error.value.exit_code == 7 and "nothing was written" in error.value.message
    assert not (tuned.run_dir / "exported").exists() and not list(tuned.run_dir.glob(".exported.tmp*"))


@pytest.mark.parametrize(
    ("difference", "change", "loss", "holds"),
    [
        (0.049, 1.0, 3.0, True),
        (0.051, 1.0, 3.0, False),
        (9e-4, 0.0, 3.0, True),
        (0.1, None, 3.0, True),
        (0.2, None, 3.0, False),
        (float("nan"), 1.0, 3.0, False),
    ],
)
def test_how_far_is_too_far(difference, change, loss, holds):
    assert Proof(1, 1, difference, change, loss).holds == holds
    tuned_N = torch.tensor([loss])
    base_N = None if change is None else tuned_N - change
    if holds:
        assert prove(1, tuned_N, base_N, tuned_N + difference, "bf16").tokens == 1
    else:
        with pytest.raises(IntegrityError) as error:
            prove(1, tuned_N, base_N, tuned_N + difference, "bf16")
        assert "export.dtype: fp32" in error.value.hint


def test_what_cannot_be_exported_is_told(fresh, tmp_path):
    with pytest.raises(DataError, match="adapter") as missing:
        export(fresh(), console=QUIET)
    assert "mmtune finetune" in missing.value.hint
    recipe = fresh(method="prompt")
    finetune(recipe, console=QUIET)
    with pytest.raises(RecipeError, match="virtual tokens") as error:
        export(recipe, console=QUIET)
    assert error.value.code == "not_mergeable" and not (recipe.run_dir / "exported").exists()


def test_another_base_is_refused(tuned, monkeypatch):
    monkeypatch.setattr("mmtune.models.tuned_from.weights_digest", lambda *_, **__: "of other weights")
    with pytest.raises(IntegrityError, match="another one than adapter/ was tuned from"):
        export(tuned, console=QUIET)


def test_tokens_of_another_model_are_refused_and_of_other_rows_told(tuned, monkeypatch):
    changed = {}

    def read(folder, **given):
        return replace(read_manifest(folder, **given), **(changed if folder.name == "tokens" else {}))

    monkeypatch.setattr("mmtune.stages.export.read_manifest", read)
    changed["facts"] = {**read_manifest(tuned.run_dir / "tokens").facts, "model": "other"}
    with pytest.raises(IntegrityError, match="tokens/ was made for the model other, adapter/ was tuned from") as error:
        export(tuned, console=QUIET)
    assert "mmtune tokenize" in error.value.hint and not (tuned.run_dir / "exported").exists()
    changed.clear()
    changed["hash"] = "of other rows"
    console = Talk(quiet=True)
    export(tuned, dry_run=True, console=console)
    assert any("compared on other rows" in line for line in console.lines), console.lines


def test_soft_tokens_that_the_adapter_does_not_know_are_told(tuned, monkeypatch):
    def with_soft(folder):
        table = open_split(folder)
        ids = [[*row, SOFT_ID] for row in table.column("input_ids").to_pylist()]
        at = table.schema.get_field_index("input_ids")
        return table.set_column(at, "input_ids", pa.array(ids, table.schema.field(at).type))

    monkeypatch.setattr("mmtune.stages.export.proof.open_split", with_soft)
    with pytest.raises(IntegrityError, match="tokens/ has soft tokens") as error:
        export(tuned, console=QUIET)
    assert "mmtune finetune --force" in error.value.hint


def test_rows_are_read_one_batch_after_the_other(tuned, monkeypatch):
    tokens, alive = tuned.run_dir / "tokens", []
    root = read_manifest(tokens).facts["media_root"]
    rows = rows_of(tokens, "train", 10, load_processor(str(tuned.run_dir / "adapter")), root)
    model = load_tuned(str(tuned.model.path), tuned.run_dir / "adapter")
    whole, made = losses_of(model, rows), RowBatches.batch

    def batch(self, numbers, step=None):
        assert sum(kept() is not None for kept in alive) <= 1, "the one before is the last that is still held"
        found = made(self, numbers, step)
        alive.append(weakref.ref(found["input_ids"]))
        return found

    monkeypatch.setattr(RowBatches, "batch", batch)
    monkeypatch.setattr("mmtune.stages.export.proof._BATCH_ROWS", 2)
    torch.testing.assert_close(losses_of(model, rows), whole)
    assert len(alive) == 5


def test_flash_attention_is_left_out_where_models_are_compared_in_fp32(tuned):
    model = Model(path=tuned.model.path, attn="flash_attention_2")
    assert export(tuned.model_copy(update={"model": model}), console=QUIET)["difference"] < 1e-5


def test_an_adapter_that_is_not_finite_is_told(tuned):
    model = load_tuned(str(tuned.model.path), tuned.run_dir / "adapter")
    next(value for name, value in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(IntegrityError, match="adapter/ cannot be merged") as error:
        merging.merged(model)
    assert error.value.code == "not_finite" and "mmtune finetune --force" in error.value.hint


def test_a_gpu_that_is_too_small_is_told(tuned, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mmtune.models.load.load_to_answer", full)
    with pytest.raises(ResourceError, match="memory does not hold the model") as error:
        export(tuned, console=QUIET)
    assert error.value.exit_code == 5 and error.value.hint.endswith("CUDA_VISIBLE_DEVICES= mmtune export")
    assert not (tuned.run_dir / "exported").exists() and not list(tuned.run_dir.glob(".exported.tmp*"))


def test_what_was_exported_is_found_again_without_torch(tuned, tmp_path):
    export(tuned, console=QUIET)
    path = tmp_path / "recipe.yaml"
    path.write_text(tuned.model_dump_json())
    code = (
        "import sys; from mmtune.recipe.text import load_recipe; from mmtune.stages.export import export;"
        "from mmtune.talk import Talk; from pathlib import Path;"
        f"made = export(load_recipe(Path({str(path)!r}), [], environ={{}}), console=Talk(quiet=True));"
        "assert made['cached'] and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("settings", [{"method": "prompt"}, {"soft_prompt": {"init": "random"}}])
def test_a_recipe_that_exports_virtual_tokens_is_refused_before_it_trains(fresh, settings):
    values = fresh(**settings).model_dump(mode="json")
    assert type(Recipe.model_validate(values)) is Recipe
    with pytest.raises(ValidationError, match="finetune trains virtual tokens"):
        Recipe.model_validate({**values, "export": {}})


def test_the_recipe_says_where_the_base_is_by_now(tuned, tmp_path):
    shutil.copytree(tuned.model.path, tmp_path / "moved")
    elsewhere = tuned.model.model_copy(update={"path": str(tmp_path / "moved")})
    assert export(tuned.model_copy(update={"model": elsewhere}), console=QUIET)["model"] == elsewhere.path
    made = read_manifest(tuned.run_dir / "tokens")
    write_manifest(tuned.run_dir / "tokens", replace(made, facts={**made.facts, "model": elsewhere.path}))
    assert export(tuned.model_copy(update={"model": elsewhere}), dry_run=True, console=QUIET)["dry_run"]
    weights = tmp_path / "moved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"tuned from, which was {tuned.model.path}") as error:
        export(tuned.model_copy(update={"model": elsewhere}), console=QUIET)
    assert error.value.exit_code == 7 and "or name it" in error.value.hint


def test_run_exports_where_the_recipe_asks_for_it(fresh):
    recipe = fresh()
    assert "export" not in [name for name, *_ in stages_of(recipe, None, True)]
    assert [name for name, *_ in stages_of(recipe.model_copy(update={"export": Export()}), None, True)][-1] == "export"
    alone = recipe.model_copy(update={"finetune": None})
    assert "stopped after tokenize" in early_end(alone)
    assert early_end(alone.model_copy(update={"export": Export()})) == ""


def test_run_says_before_it_trains_that_there_is_nothing_to_export(fresh):
    recipe = fresh().model_copy(update={"export": Export(), "finetune": None})
    with pytest.raises(RecipeError, match="the recipe has no `finetune`") as error:
        next(iter(stages_of(recipe, None, True)))
    assert error.value.exit_code == 2 and "`export` out" in error.value.hint


def test_a_damaged_export_is_not_up_to_date(tuned):
    export(tuned, console=QUIET)
    stale = tuned.run_dir / ".exported.tmp-1"
    stale.mkdir()
    assert export(tuned, console=QUIET)["cached"] and not stale.exists(), "what a killed run left is swept"
    weights = tuned.run_dir / "exported" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors") as error:
        export(tuned, console=QUIET)
    assert error.value.exit_code == 7 and "mmtune export --force" in error.value.hint
    assert not export(tuned, force=True, console=QUIET)["cached"]


def test_a_dry_run_writes_nothing(tuned):
    console = Talk(quiet=True)
    assert export(tuned, dry_run=True, console=console)["dry_run"]
    assert console.lines[-1].startswith("export: would write") and not (tuned.run_dir / "exported").exists()


def test_a_medium_that_is_gone_or_damaged_is_told_with_what_helps_there(tuned):
    made = read_manifest(tuned.run_dir / "tokens")
    shutil.copytree(made.facts["media_root"], root := tuned.run_dir / "media")
    write_manifest(tuned.run_dir / "tokens", replace(made, facts={**made.facts, "media_root": str(root)}))
    rows = rows_of(tuned.run_dir / "tokens", "train", 12, load_processor(str(tuned.run_dir / "adapter")), root)
    shown = [row.media[0].medium.path for row in rows.batches.encoded(range(12))]
    before = shown.index(shown[8])
    assert before > 0, "the first rows show other pictures"
    (root / shown[8]).unlink()
    for dry_run in (True, False):
        with pytest.raises(DataError, match="export reads it to compare both models") as error:
            export(tuned, dry_run=dry_run, console=QUIET)
        assert error.value.code == "media_missing" and f"put it back below {root}" in error.value.hint
        assert f"--set export.rows={before};" in error.value.hint
    fewer = tuned.model_copy(update={"export": Export(rows=before)})
    assert not export(fewer, console=QUIET)["cached"]
    (root / shown[0]).write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not an image; export reads it") as error:
        export(fewer, force=True, console=QUIET)
    assert "export.rows" not in error.value.hint and "mmtune build-data, then mmtune tokenize" in error.value.hint
    (root / shown[0]).unlink()
    assert export(fewer, dry_run=True, console=QUIET)["dry_run"], "what is up to date asks for no media"


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "tokens/train/data-00000-of-00001.arrow"])
def test_a_dry_run_reads_the_bytes_that_export_is_made_of(tuned, file):
    path = tuned.run_dir / file
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{path} does not have the recorded bytes"):
        export(tuned, dry_run=True, console=QUIET)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{path} is missing"):
        export(tuned, dry_run=True, console=QUIET)
