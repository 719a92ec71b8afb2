"""A resampler that reads the question does so for the answers alone: no objective finds words in media tokens."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from mmtune.models.composite.assemble import assemble
from mmtune.models.composite.encoded import encode_media
from mmtune.models.encoders import PatchesConfig
from mmtune.training.learner import CodeSettings, Learner, LearnerSettings
from mmtune.training.pair_losses import TextMasking

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model(repository):
    tokenizer = AutoTokenizer.from_pretrained(repository / "data" / "base")
    torch.manual_seed(0)
    made, _ = assemble(
        LlamaConfig(**SMALL, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=None),
        encoders={"image": PatchesConfig(**SMALL, image_size=24, patch_size=12)},
        projectors={"image": {"kind": "qformer", "queries": 2, "heads": 2, "layers": 1, "instruction": True}},
        tokenizer=tokenizer,
        vision_feature_layer=None,
        vision_feature_select_strategy="full",
    )
    return made


def batch_of(model, words):
    ids = torch.tensor([[model.config.image_token_id] * 2 + own for own in words])
    labels = ids.clone()
    labels[:, :-1] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "prompt_mask": (labels == -100).long(),
        "pixel_values": torch.rand(len(ids), 3, 24, 24, generator=torch.Generator().manual_seed(1)),
    }


def test_media_of_other_objectives_hold_no_word_of_the_question(model):
    asked, other = batch_of(model, [[20, 21, 22], [23, 24, 25]]), batch_of(model, [[30, 31, 32], [33, 34, 35]])
    found, again = (encode_media(model.model, one)["image"].features for one in (asked, other))
    assert torch.equal(found, again)
    with torch.no_grad():
        # The model itself lets its resampler read the question: zeros in its place answer otherwise.
        given = {name: value for name, value in asked.items() if name != "labels"}
        whole = model(**given).logits
        blank = model(**{**given, "prompt_mask": torch.zeros_like(asked["input_ids"])}).logits
    assert not torch.equal(whole, blank)


def test_the_answers_are_still_learned_with_the_question_read(model):
    batch = {
        **batch_of(model, [[20, 21, 22], [23, 24, 25]]),
        "keys": torch.arange(6).view(2, 3),
        "step": torch.tensor(0),
    }
    text = TextMasking(0, model.config.text_config.vocab_size, (model.config.image_token_id,))
    with torch.no_grad():
        expected = model(**{name: value for name, value in batch.items() if name not in ("keys", "step")}).loss
        for weights in ({"caption": 1.0}, {"caption": 1.0, "contrastive": 1.0}):
            codes = CodeSettings(("image", "text"), width=4)
            learner = Learner(model, LearnerSettings(weights, codes, text, 0, {})).eval()
            torch.testing.assert_close(learner.losses(batch)[0]["caption"], expected)


def test_codes_of_rows_apart_from_those_that_belong_together_teach_nothing(model):
    words = [[20 + row, 30 + row, 40 + row] for row in range(6)]
    whole = {**batch_of(model, words), "keys": torch.arange(24).view(6, 4), "step": torch.tensor(0)}
    here = torch.tensor([True, False, True, True, False, True])
    alone = {name: own[here] if own.ndim else own for name, own in whole.items()}
    weights = {"caption": 1.0, "reconstruction": 1.0, "adversarial": 1.0, "contrastive": 1.0}
    text = TextMasking(0, model.config.text_config.vocab_size, (model.config.image_token_id,))
    codes = CodeSettings(("image", "text"), width=4)

    def losses(batch, measured):
        learner = Learner(model, LearnerSettings(weights, codes, text, 0, {})).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            learner.measure([measured])
            return learner.losses(batch)[0]

    found, expected = losses({**whole, "together": here}, {**whole, "together": here}), losses(alone, alone)
    for name in ("reconstruction", "adversarial", "contrastive"):
        torch.testing.assert_close(found[name], expected[name], msg=lambda said, name=name: f"{name}: {said}")
    everything = losses(whole, whole)
    # The answers of all rows are learned.
    torch.testing.assert_close(found["caption"], everything["caption"])
    assert abs(float(found["contrastive"] - everything["contrastive"])) > 1e-3
