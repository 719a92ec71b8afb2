"""What fuses trains beside LoRA, is saved with the adapters, and comes back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmtune.errors import RecipeError
from mmtune.models.adapter import save_tuned
from mmtune.models.composite.model import CompositeForConditionalGeneration
from mmtune.models.load import load_tuned
from mmtune.models.method import with_method
from mmtune.models.towers import fingerprints, moved_towers, tower_of, tower_table
from mmtune.recipe.finetune import Finetune
from mmtune.stages.finetune.base import show_towers
from mmtune.talk import Talk
from tests.models.composite.test_fusion import batch, log_probs, model_of

LORA = {"r": 2, "alpha": 4.0, "targets": None}


def fresh(way: str) -> Any:
    """A model whose fusion is as a new one's: gates shut, segments zero."""
    torch.manual_seed(0)
    return CompositeForConditionalGeneration(model_of(way).config).eval()


def adapted(way: str, towers: list[str], base: Path) -> Any:
    model = fresh(way)
    model.save_pretrained(base)
    return with_method(model, "lora", towers=towers, lora=LORA, virtual_tokens=0, base_path=str(base))


def labelled() -> dict[str, torch.Tensor]:
    given = batch()
    given["labels"] = given["input_ids"].masked_fill(torch.arange(24) < 18, -100)
    return given


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=3e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(**labelled()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("way", ["hybrid", "late", "self", "cross", "co", "hybrid_co"])
def test_fusion_moves_and_comes_back(way: str, tmp_path: Path) -> None:
    model = adapted(way, ["llm", "fusion"], tmp_path / "base")
    table = {row.tower: row for row in tower_table(model)}
    assert table["fusion"].state == "full" and table["fusion"].trainable == table["fusion"].parameters > 0
    assert table["llm"].state == "lora"
    before, start = fingerprints(model), log_probs(model, batch())
    train(model)
    assert moved_towers(before, model) == ({"llm", "fusion"}, set(), [])
    expected = log_probs(model, batch())
    save_tuned(model, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        fused = {name for name in file.keys() if tower_of(name) == "fusion"}  # noqa: SIM118
    assert len(fused) == sum(tower_of(name) == "fusion" for name, _ in fresh(way).named_parameters())
    again = load_tuned(str(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(log_probs(again, batch()), expected)
    with again.disable_adapter():
        torch.testing.assert_close(log_probs(again, batch()), start, rtol=0, atol=1e-6)


def test_the_trained_fusion_is_what_answers(tmp_path: Path) -> None:
    """A copy that trains but is not the one that runs would be found here."""
    model = adapted("cross", ["llm", "fusion"], tmp_path / "base")
    before = log_probs(model, batch())
    with torch.no_grad():
        for name, own in model.named_parameters():
            if own.requires_grad and name.endswith("attention_gate"):
                own.fill_(1.0)
    assert not torch.allclose(log_probs(model, batch()), before, atol=1e-3)


@pytest.mark.parametrize("way", ["cross", "co", "hybrid_co"])
def test_without_its_name_fusion_stays_as_it_is(way: str, tmp_path: Path) -> None:
    model = adapted(way, ["llm"], tmp_path / "base")
    before = fingerprints(model)
    train(model)
    assert not any(own.requires_grad for name, own in model.named_parameters() if tower_of(name) == "fusion")
    assert moved_towers(before, model)[0] == {"llm"}
    console = Talk(quiet=True)
    show_towers(model, console)
    assert "add fusion to finetune.train" in console.lines[-1]


@pytest.mark.parametrize("way", ["cross", "co", "hybrid_co"])
def test_what_trains_behind_gates_that_stay_shut_is_refused(way: str, tmp_path: Path) -> None:
    model = adapted(way, ["llm", "projector"], tmp_path / "base")
    before = fingerprints(model)
    train(model)
    # The projectors get no gradient.
    assert moved_towers(before, model)[0] == {"llm"}
    with pytest.raises(RecipeError, match=r"names projector.* model\.media_attention\..*gate and") as refused:
        show_towers(model, Talk(quiet=True))
    assert "add fusion to finetune.train" in refused.value.hint
    show_towers(adapted(way, ["llm", "projector", "fusion"], tmp_path / "base"), Talk(quiet=True))
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name.endswith("gate"):
                own.fill_(0.1)
    show_towers(model, Talk(quiet=True))


def test_a_model_without_fusion_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`fusion`"):
        adapted("early", ["llm", "fusion"], tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train": ["fusion"]}, "nothing for lora"), ({"train": ["llm", "fusion"], "lora": {"init": "pissa"}}, "pissa")],
)
def test_what_does_not_go_with_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finetune(**settings)
    assert Finetune(train=("fusion",), method="full").train == ("fusion",)
