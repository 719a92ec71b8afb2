"""Fusions that read the prompt both ways: rows may be packed, but a prefix is not shared; the self-check says so."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import MediaSpan
from mmtune.encoding.tree import build_trees, tree_rows
from mmtune.errors import RecipeError
from mmtune.models.towers import linear_names
from mmtune.records import Medium
from mmtune.training.loss import answer_loss
from mmtune.training.tree_batch import TreeCollator, asking_tokens
from mmtune.training.tree_check import check_trees
from tests.training.conftest import _composite
from tests.training.test_tree_batch import both, trees_of

WAYS = {
    "self": {"attention": "self"},
    "co": {"attention": "co", "layers": [0, 1]},
    "late_co": {"mode": "late", "attention": "co", "layers": [0, 1]},
}


@pytest.fixture(params=WAYS)
def family(request: Any, tiny_family: Any) -> Any:
    """The composite processor with a model that fuses in one of the ways."""
    known = deepcopy(tiny_family("composite"))
    torch.manual_seed(0)
    model = _composite(**WAYS[request.param])(known.processor, known.processor.tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate") or name.endswith("gate.bias") or parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    known.model = model.eval()
    return known


def test_packed_rows_are_exact_and_shared_prefixes_are_not(family: Any, media: Any, served: Any) -> None:
    trees = trees_of(family, media, served)
    rows = [row for tree in trees for row in tree_rows(tree)]
    apart = [tree for k, row in enumerate(rows) for tree in build_trees([row], [str(k)], 4096)]
    loss, gradient = both(family, family.model, [apart[:5], apart[5:]], multiple_of=16)
    assert loss < 1e-5 and gradient < 1e-5
    collate = TreeCollator(Collator(family.processor, media_root=Path()))
    assert check_trees(family.model, apart[:3], collate).exact
    found = check_trees(family.model, trees, collate)
    assert not found.exact and "differs" in found.reason


@pytest.mark.parametrize("name", ["composite_late", "composite_hybrid"])
def test_auxiliary_losses_of_trees_are_those_of_rows(name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = deepcopy(tiny_family(name))
    family.model.config.fusion = {**family.model.config.fusion, "auxiliary_loss": 0.4}
    # Items that are told as unknown while training are drawn anew in each call.
    family.model.model.behaviour_tower.config.unknown_rate = 0.0
    trees = trees_of(family, media, served)
    loss, gradient = both(family, family.model.train(), [trees[1:], trees[:1]], multiple_of=16)
    assert loss < 1e-5 and gradient < 1e-5


def test_prompt_masks_of_rows_and_trees(tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family("composite")
    trees = trees_of(family, media, served)
    collate = Collator(family.processor, media_root=Path())
    packed = TreeCollator(collate)([trees])
    row_masks = [collate([row])["prompt_mask"][0] for tree in trees for row in tree_rows(tree)]
    assert all(0 < int(mask.sum()) < mask.numel() for mask in row_masks)
    at = found = 0
    for tree in map(asking_tokens, trees):
        own = packed["prompt_mask"][0, at : at + tree.input_ids.size].numpy()
        at += tree.input_ids.size
        for branch in range(1, len(tree.example_ids) + 1):
            path = (tree.branch == 0) | (tree.branch == branch)
            # What comes after the last label is not in the packed row.
            assert np.array_equal(own[path], row_masks[found].numpy()[: path.sum()])
            found += 1
    assert found == len(row_masks)


def test_frames_are_told_their_second(tiny_family: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    """Two frames of one clip and a still image, alike in pixels, differ in their features by the time alone."""
    from mmtune.records import Message, TextPart

    family = tiny_family("composite")
    medium, real = media.image(60, 44)
    served[medium.path] = real["image"]
    import mmtune.media.load as load

    monkeypatch.setattr(load, "load_video_frames", lambda root, video, count: [real["image"]] * count)
    video = Medium("video", "clip.mp4", width=60, height=44, frames=31, seconds=3.1, fps=10.0)
    talk = [Message("user", (medium, video, TextPart("What?"))), Message("assistant", (TextPart("yes"),))]
    row = replace(family.renderer.encode(talk))
    row = replace(row, media=tuple(span for span in row.media if span.frame in (0, 4)))
    assert [span.frames for span in row.media] == [0, 8, 8] and isinstance(row.media[0], MediaSpan)
    batch = Collator(family.processor, media_root=Path())([row])
    assert batch["frame_milliseconds"].tolist() == [-1, 0, 1700]
    still, first, later = family.model.get_image_features(
        batch["pixel_values"], batch["frame_milliseconds"]
    ).pooler_output
    assert not torch.allclose(first, later) and not torch.allclose(still, first)
    plain = family.model.get_image_features(batch["pixel_values"]).pooler_output
    assert torch.equal(plain[1], plain[2]) and torch.equal(still, plain[0])


def test_modality_dropout_leaves_the_loss_finite(tiny_family: Any, media: Any, served: Any) -> None:
    family = deepcopy(tiny_family("composite_hybrid"))
    family.model.config.fusion = {**family.model.config.fusion, "modality_dropout": 0.5}
    from mmtune.models.mask_rules import mask_rules

    batch = TreeCollator(Collator(family.processor, media_root=Path()))([trees_of(family, media, served)])
    rules = mask_rules(family.model)
    whole = float(answer_loss(family.model, batch, rules)[0])
    family.model.train()
    torch.manual_seed(5)
    found = [float(answer_loss(family.model, batch, rules)[0]) for _ in range(3)]
    assert np.isfinite(found).all() and len({round(loss, 3) for loss in [*found, whole]}) > 1


@pytest.mark.parametrize(("name", "refused"), [("composite", False), ("composite_late", True)])
def test_a_head_that_mixes_passes_takes_no_adapter(name: str, refused: bool, tiny_family: Any) -> None:
    model = tiny_family(name).model
    if not refused:
        assert linear_names(model, ["llm"], ["lm_head"]) == ["lm_head"]
        return
    with pytest.raises(RecipeError, match="lm_head mixes the passes of the fusion and takes no adapter"):
        linear_names(model, ["llm"], ["q_proj", "lm_head"])
