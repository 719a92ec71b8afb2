"""Packed trees have the loss and every gradient of the separate rows, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import EncodedRow
from mmtune.encoding.tree import Tree, build_trees, tree_rows
from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, use_text_attention
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.records import Message, TextPart
from mmtune.training import tree_pieces
from mmtune.training.loss import answer_loss
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_blocks import BLOCK

QUESTIONS = ["What colour is the cat?", "How many?", "Is it red, or is it blue, or white?", "Where is it?"]
# Fusions that hide modalities, or ask what a token sees.
READ_THE_MASK = ("composite_late", "composite_hybrid", "composite_cross", "composite_late_cross")
ANSWERS = ["black and white", "three of them, hello world!", "it is red", "yes"]


def trees_of(
    family: Any, media: Any, served: dict[str, Any], *, own_media: bool = True, kinds: tuple[str, ...] | None = None
) -> list[Tree]:
    """Two trees with shared media, one whose branches have media of their own, and a plain conversation."""
    shown = kinds or tuple(sorted(family.takes))

    def medium(number: int) -> list[Any]:
        parts = []
        for kind in shown:
            made, real = media.of(kind, number)
            served[made.path] = real[kind]
            parts.append(made)
        return parts

    def row(*parts: Any, answer: str) -> EncodedRow:
        return family.renderer.encode([Message("user", parts), Message("assistant", (TextPart(answer),))])

    groups = []
    for number, count in ((0, 4), (1, 3)):
        pairs = list(zip(QUESTIONS, ANSWERS, strict=True))[:count]
        groups.append([row(*medium(number), TextPart(question), answer=answer) for question, answer in pairs])
    if own_media:
        groups.append([row(TextPart("Look: "), *medium(k), TextPart(" which?"), answer=ANSWERS[k]) for k in range(3)])
    groups.append([row(TextPart("Hello world"), answer="three of them")])
    return [tree for rows in groups for tree in build_trees(rows, [str(k) for k in range(len(rows))], 4096)]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to that gradient.

    A gradient that is zero but for rounding (a key's bias, say) is measured against the whole one.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    return max(
        float((found[name] - value).norm() / torch.maximum(value.norm(), 1e-3 * whole))
        for name, value in expected.items()
    )


def apart(model: Any, collate: Collator, trees: list[Tree], step: int = 1) -> tuple[torch.Tensor, int]:
    rows = [row for tree in trees for row in tree_rows(tree)]
    parts = [answer_loss(model, collate(rows[at : at + step])) for at in range(0, len(rows), step)]
    return torch.stack([loss for loss, _ in parts]).sum(), sum(count for _, count in parts)


def both(family: Any, model: Any, bins: list[list[Tree]], multiple_of: int = 1) -> tuple[float, float]:
    """Returns the relative differences of loss and gradients, packed against one row at a time."""
    collate = Collator(family.processor, media_root=Path())
    expected, count = apart(model, collate, [tree for trees in bins for tree in trees])
    wanted = gradients(model, expected)
    packed = TreeCollator(collate, rope_index(model), multiple_of)(bins)
    found, same_count = answer_loss(model, packed, mask_rules(model))
    assert same_count == count > 0
    assert wanted
    return abs(float(found.detach() / expected.detach()) - 1), error(gradients(model, found), wanted)


def test_one_tree(family_name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family(family_name)
    tree = trees_of(family, media, served)[0]
    assert len(tree.example_ids) == 4 and (tree.branch == 0).sum() > 1
    loss, gradient = both(family, family.model, [[tree]])
    assert loss < 1e-5 and gradient < 1e-5


def test_packed_trees(family_name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    """Several trees in a row and several rows in the batch, padded, attention cut wherever it can be."""
    monkeypatch.setattr(tree_pieces, "_WORTH", 1)
    family = tiny_family(family_name)
    trees = trees_of(family, media, served)
    loss, gradient = both(family, family.model, [trees[1:], trees[:1]], multiple_of=16)
    # Of one gate of this one, rounding takes more; in double precision the difference is 5e-7.
    assert loss < 1e-5 and gradient < (3e-5 if family_name == "composite_late_cross" else 1e-5)


def test_five_hundred_questions_on_one_image(tiny_family: Any, media: Any, served: Any) -> None:
    """They make several trees, each with the image once; no question is lost or asked twice."""
    family = tiny_family("llava")
    medium, real = media.image(60, 44)
    served[medium.path] = real["image"]
    rows = [
        family.renderer.encode(
            [
                Message("user", (medium, TextPart(f"Is the cat number {number} red?"))),
                Message("assistant", (TextPart(ANSWERS[number % len(ANSWERS)]),)),
            ]
        )
        for number in range(500)
    ]
    names = [str(number) for number in range(500)]
    trees = list(build_trees(rows, names, 2048))
    assert 1 < len(trees) < 20
    assert [name for tree in trees for name in tree.example_ids] == names
    assert all(tree.input_ids.size <= 2048 and len(tree.media) == 1 for tree in trees)
    collate = Collator(family.processor, media_root=Path())
    expected, count = apart(family.model, collate, trees, step=50)
    packed = TreeCollator(collate, rope_index(family.model))
    parts = [answer_loss(family.model, packed([[tree]]), mask_rules(family.model)) for tree in trees]
    assert sum(own for _, own in parts) == count
    assert float(sum(loss.detach() for loss, _ in parts)) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_lora_with_checkpointing(family_name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    from copy import deepcopy

    from mmtune.models.adapter import add_lora

    monkeypatch.setattr(tree_pieces, "_WORTH", 1)
    family = tiny_family(family_name)
    model = deepcopy(family.model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = add_lora(
        model, towers=("llm",), targets=None, r=4, alpha=8, dropout=0.0, rslora=False, dora=False, base_path="x"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    # Checkpointing works in training mode only; no tower here has any dropout.
    model.train()
    trees = trees_of(family, media, served)
    loss, gradient = both(family, model, [trees])
    assert loss < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix", "ia3"])
@pytest.mark.parametrize("name", ["text_llama3", "llava", "llava_bytes", "idefics3", "composite"])
def test_soft_prompts(name: str, method: str, tiny_family: Any, media: Any, served: Any) -> None:
    """Virtual tokens stand once before all trees of a row, and every tree sees them; also in a sliding window."""
    from copy import deepcopy

    from mmtune.models.method import with_method

    family = tiny_family(name)
    torch.manual_seed(3)
    model = with_method(deepcopy(family.model), method, towers=["llm"], lora={}, virtual_tokens=5, base_path="")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    trees = trees_of(family, media, served)
    loss, gradient = both(family, model, [trees[1:], trees[:1]], multiple_of=16)
    assert loss < 1e-5 and gradient < 1e-5


def test_flex_attention(family_name: str, tiny_family: Any, media: Any, served: Any, flex_by_hand: None) -> None:
    """Loss and gradients through transformers' own interface; the kernel itself is stood in for, block by block."""
    from copy import deepcopy

    family = tiny_family(family_name)
    model = deepcopy(family.model)
    use_text_attention(model, FLEX)
    rules = mask_rules(model)
    trees, collate = trees_of(family, media, served), Collator(family.processor, media_root=Path())
    expected, count = apart(family.model, collate, trees)
    wanted = gradients(family.model, expected)
    packed = TreeCollator(collate, rope_index(model), BLOCK, tuple(rules.windows.values()))([trees[1:], trees[:1]])
    if family_name in READ_THE_MASK:
        with pytest.raises(CapabilityError, match="cannot read FlexAttention's masks"):
            answer_loss(model, packed, rules)
        return
    found, same_count = answer_loss(model, packed, rules)
    assert same_count == count and float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert error(gradients(model, found), wanted) < 1e-5


@pytest.mark.parametrize("name", ["text_llama3", "gemma3", "llava"])
def test_flex_attention_itself(name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    """The loss only, uncompiled: PyTorch has no backward pass of it on a CPU."""
    from copy import deepcopy

    import transformers.integrations.flex_attention as integration
    from torch.nn.attention.flex_attention import flex_attention

    def plain(q: Any, k: Any, v: Any, training: bool = False, **options: Any) -> Any:
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    family = tiny_family(name)
    model = deepcopy(family.model)
    use_text_attention(model, FLEX)
    rules, trees = mask_rules(model), trees_of(family, media, served)
    collate = Collator(family.processor, media_root=Path())
    batch = TreeCollator(collate, None, BLOCK, tuple(rules.windows.values()))([trees[1:], trees[:1]])
    with torch.no_grad():
        found, _ = answer_loss(model, batch, rules)
        expected, _ = answer_loss(family.model, batch, mask_rules(family.model))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
