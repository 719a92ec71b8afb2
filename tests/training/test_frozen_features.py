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
from mmtune.models.adapter import add_lora, train_fully
from mmtune.models.encoder_outputs import encoder_outputs, takes_none
from mmtune.models.left_out import put_back, release
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.models.towers import tower_of
from mmtune.records import READ_BY
from mmtune.training import frozen_features
from mmtune.training.frozen_features import DistinctMedia, Maker, distinct_media
from mmtune.training.loss import answer_loss
from mmtune.training.tree_batch import TreeCollator
from tests.training.test_tree_batch import apart, error, gradients, trees_of

# The images of the other families are cut into tiles that depend on their conversation, or there are none.
IMAGES = [
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
SOUNDS = ["qwen2_audio", "audio_flamingo3", "qwen2_5_omni"]
TAKES = [*IMAGES, *SOUNDS]


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
        found |= {"image_grid_thw": torch.tensor([member.grid])} if member.grid else {}
        return found | ({"audio_frames": torch.tensor([member.audio_frames])} if member.audio_frames else {})


def frozen(family: Any, towers: tuple[str, ...] = ("llm",)) -> Any:
    model = add_lora(deepcopy(family.model), towers=towers, targets=None, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def kind_of(family: Any) -> str:
    return sorted(family.takes - {"behaviour"})[-1]


def media_of(family: Any, trees: list[Tree], kind: str) -> DistinctMedia:
    token = getattr(family.processor, f"{kind}_token_id")
    found = []
    for tree in trees:
        for span in tree.media:
            if READ_BY[span.medium.modality] == kind:
                inside = tree.input_ids[span.start : span.start + span.length]
                found.append((Item(span.medium, span.frame, span.frames), int((inside == token).sum()), 1))
    return distinct_media(found)


def made(
    model: Any,
    collate: Collator,
    found: DistinctMedia,
    monkeypatch: Any,
    *,
    kind: str = "image",
    dtype: Any = None,
    before_projector: bool = False,
) -> Kept:
    monkeypatch.setattr(frozen_features, "stand_of", lambda item, root: (0, 0, ""))
    maker = Maker(model, kind, before_projector, collate, Path(), dtype, torch.device("cpu"), nullcontext)
    return Kept(*maker.make(found.items, found.tokens))


def compare(
    family: Any, model: Any, trees: list[Tree], monkeypatch: Any, *, before_projector: bool, kind: str = ""
) -> set[str]:
    """Loss and gradients with the towers in place, and from features without them; returns the features' names."""
    kind, live = kind or kind_of(family), Collator(family.processor, media_root=Path())
    kept = made(model, live, media_of(family, trees, kind), monkeypatch, kind=kind, before_projector=before_projector)
    rules, bins = mask_rules(model), [trees[1:], trees[:1]]
    expected, _ = answer_loss(model, TreeCollator(live, rope_index(model))(bins), rules)
    wanted = gradients(model, expected)
    rows_expected, _ = apart(model, live, trees)
    released = release(model, {kind}, with_projector=not before_projector)
    assert released
    cached = live.with_features(kind, kept)  # type: ignore[arg-type]
    batch = TreeCollator(cached, rope_index(model))(bins)
    assert ("pixel_values" if kind == "image" else "input_features") not in batch
    found, _ = answer_loss(model, batch, rules)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    grown = gradients(model, found)
    # What learns the times of frames has none to learn from; beside images it gets zeros.
    assert error(grown, {name: one for name, one in wanted.items() if name in grown or one.any()}) < 1e-5
    rows_found, _ = apart(model, cached, trees, step=2)
    assert rows_found.item() == pytest.approx(rows_expected.item(), rel=1e-6)
    put_back(released)
    again, _ = apart(model, live, trees)
    assert again.item() == rows_expected.item()
    return set(kept.tensors)


@pytest.mark.parametrize("name", TAKES)
def test_loss_and_gradients_are_those_of_media(
    name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any
) -> None:
    family = tiny_family(name)
    model = frozen(family)
    assert takes_none(model, kind_of(family)) == ""
    trees = trees_of(family, media, served)
    assert not any("|" in name for name in compare(family, model, trees, monkeypatch, before_projector=False))


@pytest.mark.parametrize("name", ["composite_whisper", "composite_late", "composite_hybrid", "composite_cross"])
def test_every_fusion_takes_sounds_in_their_place(
    name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any
) -> None:
    family = tiny_family(name)
    assert takes_none(family.model, "audio") == ""
    compare(family, frozen(family), trees_of(family, media, served), monkeypatch, before_projector=False, kind="audio")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", TAKES)
def test_a_projector_trains_on_what_enters_it(
    name: str, method: str, tiny_family: Any, media: Any, served: Any, monkeypatch: Any
) -> None:
    family = tiny_family(name)
    if method == "lora":
        model = frozen(family, ("llm", "projector"))
    else:
        model = train_fully(deepcopy(family.model), ["projector"])
    trains = {tower_of(name) for name, one in model.named_parameters() if one.requires_grad}
    assert ("projector" in trains) != (name == "gemma3" and method == "lora")
    trees = trees_of(family, media, served)
    names = compare(family, model, trees, monkeypatch, before_projector=True)
    assert any("|" in name for name in names) and ("llava_next" in name) == any("@" in name for name in names)


@pytest.mark.parametrize("before_projector", [False, True])
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_one_kind_of_two_is_kept(
    kind: str, before_projector: bool, tiny_family: Any, media: Any, served: Any, monkeypatch: Any
) -> None:
    """Qwen2.5-Omni sees and hears; its audio tower ends in the model's width, with no projector behind it."""
    family = tiny_family("qwen2_5_omni")
    model = frozen(family, ("llm", "projector") if before_projector else ("llm",))
    trees = trees_of(family, media, served, kinds=("image", "audio"))
    names = compare(family, model, trees, monkeypatch, before_projector=before_projector, kind=kind)
    assert any("|" in name for name in names) == (before_projector and kind == "image")


def test_bf16_features_are_close(tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    family = tiny_family("qwen3_vl")
    model = frozen(family)
    trees = trees_of(family, media, served)
    live = Collator(family.processor, media_root=Path())
    kept = made(model, live, media_of(family, trees, "image"), monkeypatch, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.tensors.values())
    expected, _ = apart(model, live, trees)
    found, _ = apart(model, live.with_features("image", kept), trees)  # type: ignore[arg-type]
    assert 0 < abs((found / expected).item() - 1) < 1e-3


def test_a_family_without_media_takes_none(tiny_family: Any) -> None:
    model = tiny_family("text_llama3").model
    assert "takes no features of images" in takes_none(model, "image")
    assert takes_none(model, "audio") and takes_none(tiny_family("llava").model, "audio")


def test_a_resampler_that_reads_the_instruction_takes_none(tiny_family: Any) -> None:
    model = deepcopy(tiny_family("composite_perceiver").model)
    assert takes_none(model, "image") == ""
    model.config.projectors["image"]["instruction"] = True
    assert "reads the instruction" in takes_none(model, "image")


def test_a_medium_of_two_lengths_is_refused() -> None:
    medium = SimpleNamespace(path="a.jpg", data=None)
    same = Item(medium)  # type: ignore[arg-type]
    found = distinct_media([(same, 4, 3), (same, 4, 2)])
    assert (found.rows, found.trees, len(found.items)) == (5, 2, 1)
    embedded = Item(SimpleNamespace(path="", data=b"raw"))  # type: ignore[arg-type]
    assert "embedded" in distinct_media([(embedded, 4, 1)]).reason
    assert "4 tokens in one row, 9 in another" in distinct_media([(same, 4, 1), (same, 9, 1)]).reason


def test_batches_do_not_change_the_features(tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    family = tiny_family("qwen2_5_vl")
    model = frozen(family)
    live = Collator(family.processor, media_root=Path())
    pictures = media_of(family, trees_of(family, media, served), "image")
    whole = made(model, live, pictures, monkeypatch)
    monkeypatch.setattr(frozen_features, "_TOKENS_AT_ONCE", 1)
    single = made(model, live, pictures, monkeypatch)
    assert [member.start for member in single.members.values()] == [m.start for m in whole.members.values()]
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(single.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    rows = pictures.tokens[0]
    tensors = live.processed(pictures.items[:1])[0]
    direct = encoder_outputs(model, "image", tensors, rows, before_projector=False)
    torch.testing.assert_close(whole.tensors["image_features"][:rows], direct["image_features"], rtol=1e-5, atol=1e-6)
