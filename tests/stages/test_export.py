"""export: what stands in exported/ is the tuned model, by transformers alone, and nothing stands there that is not."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.encoding.processor import load_processor
from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.models import merged as merging
from mmtune.models.load import load_tuned
from mmtune.order import stages_of
from mmtune.recipe.export import Export
from mmtune.stages.export import export
from mmtune.stages.export.proof import Proof, batches_of, prove
from mmtune.stages.finetune import finetune
from mmtune.storage import read_manifest
from mmtune.talk import Talk

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
    rows, batches = batches_of(tokens, "train", 5, load_processor(str(recipe.run_dir / "adapter")), root)
    assert rows == 5
    return {name: value for name, value in batches[0].items() if name != "labels"}


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
        base = (
            load_tuned(str(recipe.model.path), recipe.run_dir / "adapter").get_base_model()
            if method != "full"
            else None
        )
        found = own(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert base is None or result["change"] > 1e-3 > 100 * result["difference"]
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
    half = export(tuned.model_copy(update={"export": Export(dtype="bf16", rows=3)}), console=QUIET)
    folder = tuned.run_dir / "exported"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        half["difference"] > 10 * whole["difference"]
        and half["rows"] == 3
        and half["parameters"] == whole["parameters"]
    )
    weights = (folder / "model.safetensors").stat().st_size
    assert 2 * half["parameters"] < weights < 2.2 * half["parameters"]


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
    monkeypatch.setattr("mmtune.stages.export.weights_digest", lambda *_, **__: "of other weights")
    with pytest.raises(IntegrityError, match="another one than adapter/ was tuned from"):
        export(tuned, console=QUIET)


def test_the_recipe_says_where_the_base_is_by_now(tuned, tmp_path):
    shutil.copytree(tuned.model.path, tmp_path / "moved")
    elsewhere = tuned.model.model_copy(update={"path": str(tmp_path / "moved")})
    assert export(tuned.model_copy(update={"model": elsewhere}), console=QUIET)["model"] == elsewhere.path
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


@pytest.mark.parametrize(
    ("finetune", "says"),
    [
        ({"method": "prompt"}, "method: prompt trains virtual tokens"),
        ({"soft_prompt": {}}, "soft_prompt trains virtual tokens"),
        (None, "the recipe has no `finetune`"),
    ],
)
def test_run_says_before_it_trains_that_nothing_can_be_exported(fresh, finetune, says):
    recipe = fresh(**(finetune or {})).model_copy(update={"export": Export()})
    if finetune is None:
        recipe = recipe.model_copy(update={"finetune": None})
    with pytest.raises(RecipeError, match=says) as error:
        next(iter(stages_of(recipe, None, True)))
    assert error.value.exit_code == 2 and "`export` out" in error.value.hint


def test_a_dry_run_writes_nothing(tuned):
    console = Talk(quiet=True)
    assert export(tuned, dry_run=True, console=console)["dry_run"]
    assert console.lines[-1].startswith("export: would write") and not (tuned.run_dir / "exported").exists()
