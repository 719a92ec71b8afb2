"""The finetune stage on a GPU: the kernel of trees, resumed runs, quantized weights, and near a CPU's numbers."""

import pytest

from mmtune.models.load import load_tuned
from mmtune.stages.finetune import finetune
from mmtune.talk import Talk
from tests.gpu import needs_gpu
from tests.stages.tuned import left_by, metrics_of, numbers_of, stopped_and_resumed

pytestmark = [pytest.mark.usefixtures("own_precision"), needs_gpu]
PACKED = {"batch_rows": None, "batch_tokens": 65536, "features": {"use": "off"}}


@pytest.fixture
def packed(monkeypatch):
    """Trees share a row however little padding that spares."""
    from mmtune.stages.finetune import batches

    monkeypatch.setattr(batches, "_LEAST_PADDING", -1.0)


def said_by(recipe):
    console = Talk(quiet=True)
    finetune(recipe, console=console)
    return "\n".join(console.lines)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trees_train_by_flex_attention_as_by_the_models_own(fresh, packed, precision):
    recipe = fresh(**PACKED, precision=precision, liger="off")
    assert "by flex_attention" in said_by(recipe)
    found = numbers_of(recipe)
    own = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attn": "sdpa"})})
    finetune(own, force=True, console=Talk(quiet=True))
    for ours, wanted in zip(found, numbers_of(own), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32", "lora": {"r": 2, "dropout": 0.2}, "neftune_alpha": 5},
        {"precision": "bf16", "checkpointing": True},
        {"precision": "bf16", "optimizer": "adamw_8bit", "lora": {"r": 32}},
        {"precision": "bf16", "method": "full", "train": ["llm", "vision"]},
        {**PACKED, "precision": "bf16"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(fresh, packed, settings, monkeypatch):
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes", reason="adamw_8bit is an extra: pip install mmtune[qlora]")
    recipe = fresh(**settings, max_steps=5)
    finetune(recipe, console=Talk(quiet=True))
    weights, losses = left_by(recipe)
    assert any("resuming after step 3" in line for line in stopped_and_resumed(recipe, monkeypatch))
    again, numbers = left_by(recipe)
    assert numbers == losses
    assert again == weights


def test_quantized_weights_train_on_features(fresh):
    pytest.importorskip("bitsandbytes", reason="nf4 is an extra: pip install mmtune[qlora]")
    recipe = fresh(quantize="nf4", precision="bf16", max_steps=8, features={"use": "on"})
    assert "features stand for pixels" in said_by(recipe)
    losses = [row["loss"] for row in metrics_of(recipe)]
    assert losses[-1] < losses[0]
    load_tuned(recipe.model.path, recipe.run_dir / "adapter")


def test_ligers_kernels_change_rounding_alone(fresh):
    pytest.importorskip("liger_kernel", reason="Liger's kernels are an extra: pip install mmtune[fast]")
    with_them = fresh(precision="bf16", liger="auto")
    assert "Liger's kernels are in use" in said_by(with_them)
    found = numbers_of(with_them)
    finetune(fresh(precision="bf16", liger="off"), force=True, console=Talk(quiet=True))
    for ours, wanted in zip(found, numbers_of(with_them), strict=True):
        assert ours == pytest.approx(wanted, rel=0.05)
