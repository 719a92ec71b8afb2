"""Weights that are left out are not read, everything else is as it would be, and they come back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.models.adapter import save_tuned, train_fully
from mmtune.models.left_out import bring_back, put_back, release, set_aside, tower_weights
from mmtune.models.load import load_model
from tests.training.conftest import tiny

FAMILIES = [
    ("llava", "image"),
    ("llava_next", "image"),
    ("qwen2_5_vl", "image"),
    ("qwen3_vl", "image"),
    ("gemma3", "image"),
    ("qwen2_5_omni", "image"),
    ("qwen2_5_omni", "audio"),
    ("qwen2_audio", "audio"),
    ("audio_flamingo3", "audio"),
]


def saved(name: str, folder: Path) -> Any:
    tiny(name).model.save_pretrained(folder)
    return load_model(str(folder))


def without(folder: Path, kind: str, *, with_projector: bool) -> Any:
    return load_model(str(folder), leave_out=partial(tower_weights, kinds={kind}, with_projector=with_projector))


def buffers(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("with_projector", [True, False])
@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_they_need_not_even_be_in_the_file(name: str, kind: str, with_projector: bool, tmp_path: Path) -> None:
    whole = saved(name, tmp_path)
    names = tower_weights(whole, {kind}, with_projector=with_projector)
    assert names and not any("language_model" in one or "lm_head" in one for one in names)
    file = tmp_path / "model.safetensors"
    tensors, tower = load_file(file), {"image": ("vision", "visual"), "audio": ("audio_tower",)}[kind]
    inside = {one for one in tensors if any(word in one for word in tower) and "merger" not in one}
    save_file({one: tensor for one, tensor in tensors.items() if one not in inside}, file, metadata={"format": "pt"})
    found = without(tmp_path, kind, with_projector=with_projector)
    assert inside and {one for one, parameter in found.named_parameters() if parameter.is_meta} == names
    assert type(found) is type(whole) and not hasattr(found, "left_out")
    same = {one: tensor for one, tensor in found.state_dict().items() if not tensor.is_meta}
    assert same and all(torch.equal(tensor, whole.state_dict()[one]) for one, tensor in same.items())
    shapes = {one: (parameter.shape, parameter.dtype) for one, parameter in whole.named_parameters()}
    assert {one: (parameter.shape, parameter.dtype) for one, parameter in found.named_parameters()} == shapes


@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_they_come_back(name: str, kind: str, tmp_path: Path) -> None:
    whole = saved(name, tmp_path)
    found = without(tmp_path, kind, with_projector=True)
    with set_aside(found):
        found.to("cpu")
    bring_back(found, lambda leave_out: load_model(str(tmp_path), leave_out=leave_out), {kind})
    for here, there in ((found.state_dict(), whole.state_dict()), (buffers(found), buffers(whole))):
        assert here.keys() == there.keys()
        assert all(torch.equal(tensor, there[one]) for one, tensor in here.items())


def test_a_model_that_had_them_released_is_saved_whole(tmp_path: Path) -> None:
    whole = train_fully(saved("llava", tmp_path / "base"), ["llm"])
    save_tuned(whole, tmp_path / "before")
    release(whole, {"image"}, with_projector=True)
    bring_back(whole, lambda leave_out: load_model(str(tmp_path / "base"), leave_out=leave_out))
    save_tuned(whole, tmp_path / "after")
    files = [tmp_path / folder / "model.safetensors" for folder in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_released_can_be_put_back(tmp_path: Path) -> None:
    whole = saved("llava", tmp_path)
    before = {one: tensor.clone() for one, tensor in whole.state_dict().items()}
    released = release(whole, {"image"}, with_projector=False)
    absent = {one for one, parameter in whole.named_parameters() if parameter.is_meta}
    assert absent and all("vision_tower" in one for one in absent)
    put_back(released)
    assert all(torch.equal(tensor, before[one]) for one, tensor in whole.state_dict().items())


def test_the_rest_of_a_quantized_model_is_quantized(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="nf4 is an extra: pip install mmtune[qlora]")
    saved("llava", tmp_path)
    leave_out = partial(tower_weights, kinds={"image"}, with_projector=True)
    found = load_model(str(tmp_path), nf4=True, leave_out=leave_out)
    whole = load_model(str(tmp_path), nf4=True)
    state = whole.state_dict()
    here = {one: tensor for one, tensor in found.state_dict().items() if not tensor.is_meta}
    assert any(tensor.dtype == torch.uint8 for tensor in here.values())
    assert all(torch.equal(tensor, state[one]) for one, tensor in here.items()) and len(here) < len(state)
