"""Soft prompts put in from outside: the vectors of typed words do what the words do."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from course import Rows, tiny_model

from mmtune.models.adapter import save_tuned
from mmtune.models.load import load_model, load_tuned
from mmtune.models.soft_prompt import add_soft_prompt, set_virtual_tokens, word_vectors

TYPED = [5, 9, 11, 7]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return str(folder)


def batch():
    made = Rows().batch(range(3))
    made.pop("labels")
    return made


def log_probs(logits):
    return torch.log_softmax(logits.float(), -1)


def typed_in(base):
    """What the base says of the rows behind the typed words."""
    given = batch()
    rows = len(given["input_ids"])
    front = torch.tensor([TYPED] * rows)
    given["input_ids"] = torch.cat((front, given["input_ids"]), 1)
    given["attention_mask"] = torch.cat((torch.ones_like(front), given["attention_mask"]), 1)
    with torch.no_grad():
        return log_probs(load_model(base)(**given, use_cache=False).logits[:, len(TYPED) :])


def soft(base):
    model = add_soft_prompt(load_model(base), "prompt", virtual_tokens=len(TYPED), base_path=base).eval()
    set_virtual_tokens(model, word_vectors(model)[TYPED])
    return model


def test_the_vectors_of_words_give_the_log_probabilities_of_the_words(base):
    wanted = typed_in(base)
    with torch.no_grad():
        ours = log_probs(soft(base)(**batch(), use_cache=False).logits)
        without = log_probs(load_model(base)(**batch(), use_cache=False).logits)
    kept = batch()["attention_mask"].bool()
    assert torch.allclose(ours[kept], wanted[kept], atol=1e-5), float((ours - wanted)[kept].abs().max())
    assert not torch.allclose(without[kept], wanted[kept], atol=1e-2)


def test_it_comes_back_from_an_adapter_folder(base, tmp_path):
    save_tuned(soft(base), tmp_path / "adapter")
    back = load_tuned(base, tmp_path / "adapter")
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        ours = log_probs(back(**batch(), use_cache=False).logits)
    assert torch.allclose(ours[kept], typed_in(base)[kept], atol=1e-5)


def test_the_base_is_left_alone_and_takes_prompts_one_after_the_other(base):
    model = soft(base)
    before = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    set_virtual_tokens(model, torch.zeros(len(TYPED), word_vectors(model).shape[1]))
    set_virtual_tokens(model, word_vectors(model)[TYPED])
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="virtual tokens"):
        set_virtual_tokens(model, torch.zeros(1, 4))
