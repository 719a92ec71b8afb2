"""Every way to fuse: gates that pick one branch are that branch, generation with a cache is generation without."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.model import CompositeForConditionalGeneration
from mmtune.models.encoders import LogMelConfig

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE, AUDIO, PAD = 3, 4, 0
WAYS: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"mode": "late"},
    "hybrid": {"mode": "hybrid", "instruction": True},
    "self": {"attention": "self"},
    "late_self": {"mode": "late", "attention": "self"},
    "cross": {"attention": "cross", "layers": [0, 2]},
    "co": {"attention": "co", "layers": [0, 1, 2]},
    "hybrid_co": {"mode": "hybrid", "attention": "co", "layers": [1, 2]},
    "qformer": {"mode": "late", "projector": {"kind": "qformer", "queries": 4, "heads": 4, "instruction": True}},
}


def model_of(way: str, **more: Any) -> Any:
    fusion = {**WAYS[way], **more}
    projector = fusion.pop("projector", {"kind": "mlp"})
    torch.manual_seed(0)
    config = CompositeConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=14, patch_size=7),
        audio_config=LogMelConfig(**SMALL, num_mel_bins=8),
        text_config=LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=2, pad_token_id=PAD, eos_token_id=None),
        audio_convolutions=[[3, 2, 1], [3, 2, 1]],
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        projectors={"image": projector, "audio": projector},
        fusion=fusion,
    )
    model = CompositeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("gate") or name.endswith("gate.bias"):
                parameter.normal_(0, 1.0)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 24 tokens, padded on the left: an image and a sound, an image alone, text alone."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 24))
    mask = torch.ones_like(ids)
    ids[0, 3:7], ids[0, 9:13] = IMAGE, AUDIO
    ids[1, :4], mask[1, :4] = PAD, 0
    ids[1, 6:10] = IMAGE
    ids[2, :8], mask[2, :8] = PAD, 0
    frames = torch.randn(1, 8, 16)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 14, 14),
        "input_features": frames,
        "feature_attention_mask": torch.ones(1, 16),
    }


def row_of(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of ``batch`` with its media."""
    keep = given["attention_mask"][row].bool()
    made = {name: given[name][row, keep][None] for name in ("input_ids", "attention_mask")}
    if row < 2:
        made["pixel_values"] = given["pixel_values"][row : row + 1]
    if row == 0:
        made |= {name: given[name] for name in ("input_features", "feature_attention_mask")}
    return made


def log_probs(model: Any, given: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return model(**given, **more).logits.float().log_softmax(-1)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_the_same_in_any_company(way: str) -> None:
    """Passes are planned per batch, so this also says that a row does not care how many there are."""
    model, given = model_of(way), batch()
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = log_probs(model, given, position_ids=positions)
    for row in range(3):
        alone = log_probs(model, row_of(given, row))[0]
        torch.testing.assert_close(together[row, -alone.shape[0] :], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_generates_with_its_cache_as_without(way: str) -> None:
    model, given = model_of(way), batch()
    asked: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": PAD,
        "suppress_tokens": [IMAGE, AUDIO],
    }
    found = model.generate(**given, **asked)
    ids, mask = given["input_ids"], given["attention_mask"]
    prompt = mask
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        now = {**given, "input_ids": ids, "attention_mask": mask, "prompt_mask": prompt}
        scores = model(**now, position_ids=positions).logits[:, -1].clone()
        scores[:, [IMAGE, AUDIO]] = -torch.inf
        after = scores.argmax(-1)
        ids, mask = torch.cat((ids, after[:, None]), 1), torch.cat((mask, mask[:, -1:]), 1)
        prompt = torch.cat((prompt, prompt[:, :1] * 0), 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded(way: str, tmp_path: Any) -> None:
    model, given = model_of(way), batch()
    model.save_pretrained(tmp_path)
    again, info = CompositeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again.eval()(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_and_copies_change_nothing(way: str) -> None:
    model, given = deepcopy(model_of(way)), batch()
    given["labels"] = given["input_ids"].masked_fill(torch.arange(24) < 18, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**given).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected = gradients()
    assert all(bool(value.isfinite().all()) for value in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_not_seen_before_their_time(way: str) -> None:
    model, given = model_of(way), batch()
    given["prompt_mask"] = given["attention_mask"] * (torch.arange(24) < 16)
    before = log_probs(model, given)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 20] = 7
    after = log_probs(model, other)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 20:], before[:, 20:], atol=1e-3)


@pytest.mark.parametrize("way", ["late", "hybrid", "hybrid_co"])
def test_a_gate_on_one_branch_is_that_branch(way: str) -> None:
    model, given = model_of(way, instruction=False), batch()
    early = model_of("early")
    early.config.fusion = {**model.config.fusion, "mode": "early"}
    state = {name: value for name, value in model.state_dict().items() if "gate.bias" not in name}
    single = CompositeForConditionalGeneration(early.config)
    single.load_state_dict(state)
    single.eval()
    one = row_of(given, 0)
    sound = ("input_features", "feature_attention_mask")
    hidden = {"joint": (-1, ()), "image": (AUDIO, sound), "audio": (IMAGE, ("pixel_values",))}
    for place, branch in enumerate(model.config.branches):
        with torch.no_grad():
            model.model.gate.bias.fill_(-1e4)
            model.model.gate.bias[place] = 0.0
        token, media = hidden[branch]
        # The row as it would be without the medium, whose length no word's position tells.
        kept = one["input_ids"][0] != token
        row = {name: value[:, kept] if value.shape == (1, 24) else value for name, value in one.items()}
        expected = log_probs(single, {name: value for name, value in row.items() if name not in media})
        # Before a medium stands, its branch is absent and the others speak.
        words = kept & (torch.arange(24) >= 13)
        found = log_probs(model, one)[:, words]
        torch.testing.assert_close(found, expected[:, words[kept]], rtol=0, atol=1e-5)


def test_the_joint_pass_leads_a_fresh_hybrid() -> None:
    fresh = CompositeForConditionalGeneration(model_of("hybrid").config)
    weights = fresh.model.gate.bias.softmax(0)
    torch.testing.assert_close(weights, torch.tensor([0.9, 0.05, 0.05]))


def test_missing_modalities_have_no_weight() -> None:
    model, given = model_of("hybrid"), batch()
    made = model(**given)
    weights = made.log_gate.exp()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 24))
    assert (weights[1, -1, 2], weights[2, -1, 1], weights[2, -1, 2]) == (0, 0, 0)
    assert (weights[0, -1] > 0).all() and weights[2, -1, 0] == 1
    assert weights[0, 8, 2] == 0 and weights[0, 10, 2] > 0, "a sound counts from where it stands"


def test_modality_dropout_hides_one_and_never_the_last() -> None:
    model, given = model_of("early", modality_dropout=0.5), batch()
    one, image = row_of(given, 0), row_of(given, 1)
    full = log_probs(model, one)
    model.train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        found = log_probs(model, one)
        seen.add(round(float(found[0, -1, 7]), 4))
        torch.manual_seed(seed)
        assert torch.equal(log_probs(model, one), found), "the seed of a step decides"
        model.eval()
        expected = log_probs(model, image)
        model.train()
        torch.testing.assert_close(log_probs(model, image), expected)
    assert len(seen) == 3 and round(float(full[0, -1, 7]), 4) in seen


def test_training_must_know_the_prompt() -> None:
    model = model_of("self").train()
    with pytest.raises(ValueError, match="prompt_mask"):
        model(**batch())


def test_beams_are_refused() -> None:
    from mmtune.errors import CapabilityError

    with pytest.raises(CapabilityError, match="beams"):
        model_of("late").generate(**batch(), max_new_tokens=2, num_beams=2)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"mode": "middle"}, "early, late, hybrid"),
        ({"attention": "cross"}, "names the layers"),
        ({"attention": "cross", "layers": [7]}, "0 to 2"),
        ({"modality_dropout": 1.0}, "in \\[0, 1\\)"),
        ({"mod": "late"}, "no setting 'mod'"),
    ],
)
def test_wrong_settings_are_refused(fusion: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompositeConfig(text_config=LlamaConfig(**SMALL), fusion=fusion)


@pytest.mark.parametrize("row", [None, 1])
def test_scores_of_the_branches(row: int | None) -> None:
    """The mixture's own likelihood comes out of what each branch says and how much it is trusted, per token."""
    from mmtune.models.composite.scores import branch_scores

    model, given = model_of("hybrid"), batch()
    given = given if row is None else row_of(given, row)
    given["labels"] = given["input_ids"].clone()
    given["labels"][:, :-1] = -100
    given["prompt_mask"] = (given["labels"] == -100).long()
    found = branch_scores(model, given)
    assert found.branches == ("joint", "image", "audio") and found.nll.shape == (len(given["labels"]), 3)
    mixed = -((found.gate * (-found.nll).exp()).sum(1)).log()
    own = log_probs(model, {name: value for name, value in given.items() if name != "labels"})[:, -2]
    torch.testing.assert_close(mixed, -own.gather(1, given["labels"][:, -1:])[:, 0], rtol=1e-5, atol=1e-5)
    assert float(found.gate[-1, 2]) == 0.0 and (found.entropy >= 0).all()
    with pytest.raises(ValueError, match="one branch"):
        branch_scores(model_of("early"), given)


@pytest.mark.parametrize("way", ["late", "hybrid", "hybrid_co"])
def test_a_branch_answers_alone_while_it_is_asked_to(way: str) -> None:
    from mmtune.models.composite.scores import branches_of, only_branch

    model, one = model_of(way, instruction=False), row_of(batch(), 0)
    usual, bias = log_probs(model, one), model.model.gate.bias.detach().clone()
    for place, branch in enumerate(branches_of(model)):
        with torch.no_grad():
            model.model.gate.bias.fill_(-1e4)
            model.model.gate.bias[place] = 0.0
        expected = log_probs(model, one)
        with torch.no_grad():
            model.model.gate.bias.copy_(bias)
        with only_branch(model, branch):
            found = log_probs(model, one)
        torch.testing.assert_close(found[:, 13:], expected[:, 13:], rtol=0, atol=1e-5)
    assert torch.equal(log_probs(model, one), usual)
    assert branches_of(model_of("early")) == ()
