"""Prototypes: states are those of one prompt alone, and the nearest mean is scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from mmtune.evaluation.generation import Stopped
from mmtune.evaluation.prototypes import nearest_option, prompt_states, prototypes
from mmtune.models.method import with_method
from tests.evaluation.test_generation import collate, model, rows

__all__ = ["model", "rows"]


def states(model, rows, batch_rows, **more) -> np.ndarray:
    return prompt_states(
        model,
        lambda chosen: [rows[at] for at in chosen],
        lambda some: collate(some, left=False),
        sizes=[row.input_ids.size for row in rows],
        batch_rows=batch_rows,
        **more,
    )


def test_a_state_is_the_last_one_of_its_prompt_alone(model, rows):
    found = states(model, rows, 3)
    assert found.shape == (7, 32) and found.dtype == np.float32
    for state, row in zip(found, rows, strict=True):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor(row.input_ids)[None].long()).last_hidden_state[0, -1]
        np.testing.assert_allclose(state, alone, atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_states_behind_virtual_tokens_and_adapters_are_the_tuned_models(model, rows, method):
    from copy import deepcopy

    torch.manual_seed(0)
    lora = {"targets": None, "r": 2, "alpha": 4}
    tuned = with_method(deepcopy(model), method, towers=["llm"], lora=lora, virtual_tokens=3, base_path="").eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    found = states(tuned, rows, 4)
    head = tuned.get_base_model().lm_head.weight.detach().numpy()
    for state, row in zip(found, rows, strict=True):
        ids = torch.tensor(row.input_ids)[None].long()
        with torch.no_grad():
            logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        np.testing.assert_allclose(head @ state, logits, atol=1e-4)
    assert not np.allclose(found, states(model, rows, 4), atol=1e-2)


def test_a_signal_ends_it_and_leaves_the_model_as_it_was(model, rows):
    with pytest.raises(Stopped):
        states(model, rows, 2, should_stop=lambda: True)
    assert not model.lm_head._forward_pre_hooks
    assert states(model, [], 2).size == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_prototype_is_that_of_scikit_learn(seed: int):
    dice = np.random.default_rng(seed)
    options = ("red", "green", "blue")
    owners = [*options, *dice.choice(options, 30)]
    known = dice.normal(size=(33, 6)).astype(np.float32) + [[options.index(one)] for one in owners]
    asked = dice.normal(size=(50, 6)).astype(np.float32) + 1
    means = prototypes(known.astype(np.float32), [("s", one) for one in owners])
    found = [nearest_option(state, "s", options, means) for state in asked]
    assert found == NearestCentroid().fit(known.astype(np.float32), owners).predict(asked).tolist()
    # Only options of the row, and of its own source, can be an answer.
    assert {nearest_option(state, "s", ("blue", "pink"), means) for state in asked} == {"blue"}
    assert nearest_option(asked[0], "other", options, means) is None


def test_of_equally_near_prototypes_the_first_is_the_answer():
    state = np.zeros(2, np.float32)
    means = prototypes(np.array([[1, 0], [0, 1]], np.float32), [("s", "b"), ("s", "a")])
    assert nearest_option(state, "s", ("a", "b"), means) == "a"
    assert nearest_option(state, "s", ("b", "a"), means) == "b"
