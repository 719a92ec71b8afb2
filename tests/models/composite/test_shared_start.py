"""The beginning of rows runs once for all passes: the same logits, gradients and answers, in fewer tokens."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from mmtune.models.composite.model import CompositeForConditionalGeneration
from mmtune.models.method import with_method
from mmtune.training.loss import answer_loss
from tests.models.composite.test_fusion import AUDIO, IMAGE, PAD, SMALL, batch, model_of
from tests.training.test_tree_batch import error

WAYS = {
    "late": {},
    "hybrid": {},
    "qformer": {},
    "windowed": {"shared": False},
    "hybrid_co": {"shared": False},
    "late_self": {"shared": False},
    "early": {"shared": False},
}
LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "dora": False, "rslora": False, "targets": None, "pissa": False}
WORDS, START = 3, 7
"""Leading tokens of ``batch`` before a medium stands in any row, and before words stand behind media."""


def known(way: str) -> Any:
    if way != "windowed":
        return model_of(way)
    config = deepcopy(model_of("hybrid").config)
    sizes = {name: getattr(config.text_config, name) for name in (*SMALL, "vocab_size", "num_key_value_heads")}
    config.text_config = MistralConfig(**sizes, sliding_window=12, pad_token_id=PAD)
    return CompositeForConditionalGeneration(config).eval()


@pytest.fixture
def apart(monkeypatch: Any) -> Any:
    """Makes every pass run over all of its tokens."""

    def run(work: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("mmtune.models.composite.model.shared_start", lambda *given, **more: 0)
            return work()

    return run


def tokens_of(model: Any, work: Any) -> int:
    """How many tokens the language model runs on."""
    seen: list[int] = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    work()
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("way", WAYS)
def test_the_start_runs_once_where_passes_agree(way: str, apart: Any) -> None:
    model, given = known(way), batch()

    def run() -> int:
        return tokens_of(model, lambda: model(**given))

    passes = model(**given).passes.count
    saved = (passes - 1) * START * 3 if WAYS[way].get("shared", True) else 0
    assert passes > 1 or way == "early"
    assert apart(run) - run() == saved


@pytest.mark.parametrize("way", ["late", "hybrid", "qformer"])
@pytest.mark.parametrize("form", ["padding", "prepared"])
def test_logits_are_those_of_whole_passes(way: str, form: str, apart: Any) -> None:
    model, given = model_of(way), batch()
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if form == "prepared":
        there = given["attention_mask"].bool()
        seen = torch.ones(24, 24, dtype=torch.bool).tril() & there[:, None] | torch.eye(24, dtype=torch.bool)
        given["attention_mask"] = seen[:, None]
    expected, found = apart(lambda: model(**given)), model(**given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["late", "hybrid", "qformer"])
@pytest.mark.parametrize("first", [18, 1], ids=["answers behind the media", "also before"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_loss_and_gradients_are_those_of_whole_passes(way: str, first: int, method: str, apart: Any) -> None:
    model, given = deepcopy(model_of(way)), batch()
    if method == "lora":
        model = with_method(model, "lora", towers=("llm",), lora=LORA, virtual_tokens=0, base_path="base")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    model.train()
    given["labels"] = given["input_ids"].masked_fill(torch.arange(24) < first, -100)
    given["labels"][given["attention_mask"] == 0] = -100
    given["prompt_mask"] = given["attention_mask"]

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss, _ = answer_loss(model, given)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (loss, expected), (other, found) = apart(gradients), gradients()
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-5)
    assert error(found, expected) < 2e-5


@pytest.mark.parametrize("way", ["late", "hybrid"])
def test_answers_are_those_of_whole_passes(way: str, apart: Any) -> None:
    model, given = model_of(way), batch()
    given["input_ids"] = torch.cat((torch.full((3, 5), PAD), given["input_ids"]), 1)
    given["attention_mask"] = torch.cat((torch.zeros(3, 5, dtype=torch.long), given["attention_mask"]), 1)

    def answer() -> Any:
        asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [IMAGE]}
        return model.generate(**given, **asked, return_dict_in_generate=True, output_logits=True)

    expected, found = apart(answer), answer()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


def test_media_that_may_be_dropped_run_in_every_pass(apart: Any) -> None:
    model, given = model_of("hybrid", modality_dropout=0.5).train(), batch()
    given["prompt_mask"] = given["attention_mask"]

    def run() -> Any:
        torch.manual_seed(2)
        return model(**given)

    torch.testing.assert_close(run().logits, apart(run).logits, rtol=0, atol=1e-5)
    assert apart(lambda: tokens_of(model, run)) - tokens_of(model, run) == 2 * WORDS * 3


@pytest.mark.parametrize("way", ["late", "hybrid"])
def test_the_first_medium_may_be_of_any_modality(way: str, apart: Any) -> None:
    model, given = model_of(way), batch()
    given["input_ids"][0, 3:7], given["input_ids"][0, 9:13] = AUDIO, IMAGE
    saved = apart(lambda: tokens_of(model, lambda: model(**given))) - tokens_of(model, lambda: model(**given))
    assert saved == (model(**given).passes.count - 1) * START * 3
    torch.testing.assert_close(model(**given).logits, apart(lambda: model(**given)).logits, rtol=0, atol=1e-5)


def test_states_of_layers_are_those_of_whole_passes() -> None:
    model, given = model_of("hybrid"), batch()
    made = model(**given, output_hidden_states=True, use_cache=False)
    assert {states.shape[1] for states in made.hidden_states} == {24} and made.past_key_values is None
    assert model(**given, use_cache=False).past_key_values is None
    assert model(**given).past_key_values.get_seq_length() == 24
