"""Every parameter of the supported families belongs to the right tower."""

import pytest
import torch
from torch import nn

from mmtune.errors import RecipeError
from mmtune.models.adapter import add_lora, train_fully
from mmtune.models.towers import fingerprints, linear_names, moved_towers, tower_of, tower_table


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "llm"),
        ("lm_head.weight", "llm"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "projector"),
        ("audio_tower.layers.0.fc1.weight", "audio"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "llm"),
        ("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight", "vision"),
        ("model.image_newline", "projector"),
        ("model.gate.bias", "fusion"),
        ("base_model.model.model.segments.modules_to_save.default.weight", "fusion"),
        ("model.media_attention.2.text_attention.attention.query.weight", "fusion"),
        ("model.language_model.layers.0.mlp.gate.weight", "llm"),
    ],
)
def test_names_of_the_families(name, tower):
    assert tower_of(name) == tower


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = nn.ModuleDict({"fc1": nn.Linear(4, 4)})
        self.multi_modal_projector = nn.Linear(4, 4)
        self.language_model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})

    def forward(self, x):
        x = self.multi_modal_projector(self.vision_tower["fc1"](x))
        return self.language_model["o_proj"](self.language_model["q_proj"](x))


def test_targets_stay_inside_the_chosen_towers():
    assert linear_names(Tiny(), ["llm"], None) == ["language_model.o_proj", "language_model.q_proj"]
    assert linear_names(Tiny(), ["vision", "llm"], ["fc1", "q_proj"]) == [
        "language_model.q_proj",
        "vision_tower.fc1",
    ]


@pytest.mark.parametrize("targets", [["q_pro"], ["q_proj", "fc1"]])
def test_a_target_that_matches_nothing_is_an_error(targets):
    with pytest.raises(RecipeError, match="matches no linear layer"):
        linear_names(Tiny(), ["llm"], targets)


def test_a_tower_that_is_not_there_is_an_error():
    with pytest.raises(RecipeError, match="audio"):
        train_fully(Tiny(), ["audio"])


@pytest.mark.parametrize("train", [["llm"], ["vision", "projector"]])
def test_only_the_chosen_towers_move(train):
    model = train_fully(Tiny(), train)
    before = fingerprints(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    moved, still, wrong = moved_towers(before, model)
    assert (moved, still, wrong) == (set(train), set(), [])
    with torch.no_grad():
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        frozen.add_(1.0)
    assert moved_towers(before, model)[2]
    states = {row.tower: row.state for row in tower_table(model)}
    assert states == {
        t: "absent" if t in ("audio", "behaviour", "fusion") else "full" if t in train else "frozen" for t in states
    }


def test_lora_counts():
    wrapped = add_lora(Tiny(), towers=["llm"], targets=None, r=2, alpha=4)
    table = {row.tower: row for row in tower_table(wrapped)}
    assert table["llm"].state == "lora" and table["llm"].trainable == 2 * (4 * 2 + 2 * 4)
    assert table["vision"].trainable == 0
