"""Features of a frozen tower give the loss and the gradients of its pixels, in every family that takes them."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import Tree
from mmtune.features.shards import Item, item_name
from mmtune.models.adapter import add_lora
from mmtune.models.image_features import image_features, put_back, release_image_towers, trains_on_pixels
from mmtune.training import frozen_features
from mmtune.training.frozen_features import Maker, Pictures, distinct_pictures
from mmtune.training.loss import answer_loss
from mmtune.training.rope_index import rope_index
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_mask import mask_rules
from tests.training.test_tree_batch import apart, error, gradients, trees_of

# The images of these are cut into tiles that depend on their conversation, or there are none.
TAKES = [
    "llava",
    "llava_bytes",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "smolvlm",
    "composite",
]


class Kept:
    """Features in memory, as ``shards.Features`` gives them from disk."""

    def __init__(self, members: list[Any], tensors: dict[str, torch.Tensor]) -> None:
        self.members = {member.item: member for member in members}
        self.tensors = tensors

    def tokens(self, item: Item) -> int:
        return self.members[item_name(item)].tokens

    def __getitem__(self, item: Item) -> dict[str, torch.Tensor]:
        member = self.members[item_name(item)]
        own = slice(member.start, member.start + member.length)
        found = {name: tensor[own] for name, tensor in self.tensors.items()}
        return found | ({"image_grid_thw": torch.tensor([member.grid])} if member.grid else {})


def frozen(family: Any) -> Any:
    model = add_lora(deepcopy(family.model), towers=("llm",), targets=None, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def pictures_of(trees: list[Tree], token: int) -> Pictures:
    found = []
    for tree in trees:
        for span in (span for span in tree.media if span.medium.modality != "audio"):
            inside = tree.input_ids[span.start : span.start + span.length]
            found.append((Item(span.medium, span.frame, span.frames), int((inside == token).sum()), 1))
    return distinct_pictures(found, as_trees=True)


def made(model: Any, collate: Collator, pictures: Pictures, monkeypatch: Any, dtype: Any = None) -> Kept:
    monkeypatch.setattr(frozen_features, "stand_of", lambda item, root: (0, 0, ""))
    maker = Maker(model, collate, Path(), dtype, torch.device("cpu"), nullcontext)
    return Kept(*maker.make(pictures.items, pictures.tokens))


@pytest.mark.parametrize("name", TAKES)
def test_loss_and_gradients_are_those_of_pixels(
    name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any
) -> None:
    family = tiny_family(name)
    model = frozen(family)
    assert trains_on_pixels(model) == ""
    trees = trees_of(family, media, served)
    live = Collator(family.processor, media_root=Path())
    kept = made(model, live, pictures_of(trees, family.processor.image_token_id), monkeypatch)
    rules = mask_rules(model)
    expected, _ = answer_loss(model, TreeCollator(live, rope_index(model))([trees[1:], trees[:1]]), rules)
    wanted = gradients(model, expected)
    rows_expected, _ = apart(model, live, trees)
    released = release_image_towers(model)
    cached = live.with_features(kept)  # type: ignore[arg-type]
    batch = TreeCollator(cached, rope_index(model))([trees[1:], trees[:1]])
    assert "pixel_values" not in batch
    found, _ = answer_loss(model, batch, rules)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert error(gradients(model, found), wanted) < 1e-5
    rows_found, _ = apart(model, cached, trees)
    assert rows_found.item() == pytest.approx(rows_expected.item(), rel=1e-6)
    put_back(released)
    again, _ = apart(model, live, trees)
    assert again.item() == rows_expected.item()


def test_bf16_features_are_close(tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    family = tiny_family("qwen3_vl")
    model = frozen(family)
    trees = trees_of(family, media, served)
    live = Collator(family.processor, media_root=Path())
    kept = made(model, live, pictures_of(trees, family.processor.image_token_id), monkeypatch, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.tensors.values())
    expected, _ = apart(model, live, trees)
    found, _ = apart(model, live.with_features(kept), trees)  # type: ignore[arg-type]
    assert 0 < abs((found / expected).item() - 1) < 1e-3


def test_a_tower_that_trains_needs_pixels(tiny_family: Any) -> None:
    model = deepcopy(tiny_family("llava").model)
    assert trains_on_pixels(model) == "vision and projector train"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    assert trains_on_pixels(model) == ""
    reads = deepcopy(tiny_family("composite_perceiver").model)
    reads.requires_grad_(False)
    assert trains_on_pixels(reads) == ""
    reads.config.projectors["image"]["instruction"] = True
    assert "reads the instruction" in trains_on_pixels(reads)
    assert "takes no image features" in trains_on_pixels(tiny_family("text_llama3").model)


def test_an_image_of_two_lengths_is_refused() -> None:
    medium = SimpleNamespace(path="a.jpg", data=None)
    same = Item(medium)  # type: ignore[arg-type]
    assert distinct_pictures([(same, 4, 3), (same, 4, 2)], as_trees=False).runs == 5
    assert distinct_pictures([(same, 4, 3), (same, 4, 2)], as_trees=True).runs == 2
    embedded = Item(SimpleNamespace(path="", data=b"raw"))  # type: ignore[arg-type]
    assert "embedded" in distinct_pictures([(embedded, 4, 1)], as_trees=True).reason
    assert "4 tokens in one row, 9 in another" in distinct_pictures([(same, 4, 1), (same, 9, 1)], as_trees=True).reason


def test_batches_do_not_change_the_features(tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    family = tiny_family("qwen2_5_vl")
    model = frozen(family)
    live = Collator(family.processor, media_root=Path())
    pictures = pictures_of(trees_of(family, media, served), family.processor.image_token_id)
    whole = made(model, live, pictures, monkeypatch)
    monkeypatch.setattr(frozen_features, "_TOKENS_AT_ONCE", 1)
    single = made(model, live, pictures, monkeypatch)
    assert [member.start for member in single.members.values()] == [m.start for m in whole.members.values()]
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(single.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    direct = image_features(model, live.processed(pictures.items[:1])[0])
    rows = pictures.tokens[0]
    torch.testing.assert_close(whole.tensors["image_features"][:rows], direct["image_features"], rtol=1e-5, atol=1e-6)
