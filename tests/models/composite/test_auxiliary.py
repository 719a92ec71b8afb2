"""The auxiliary losses of late and hybrid fusion, against the cross-entropies of passes that run by themselves."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import functional

from mmtune.models.composite.auxiliary import blended
from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.scores import only_branch
from mmtune.models.fusion.gate import mix
from mmtune.models.method import with_method
from mmtune.training.loss import answer_loss, answer_losses
from tests.models.composite.test_fusion import AUDIO, IMAGE, batch, log_probs, model_of, row_of
from tests.training.test_tree_batch import error

SHARE = 0.4
LORA: dict[str, Any] = {"r": 2, "alpha": 4.0, "targets": None}
HIDDEN = {"joint": (), "image": (AUDIO,), "audio": (IMAGE,)}
"""What a branch does not see."""
WEIGHED = {
    "late": (("image", "audio"), ("image",), ("image", "audio")),
    "hybrid": (("joint", "image", "audio"), ("joint", "image"), ("joint",)),
}
"""Of each row of ``batch``, the branches that the gate weighs at its last tokens; late weighs both on words alone."""


def labelled(first: int = 18) -> dict[str, torch.Tensor]:
    given = batch()
    given["labels"] = given["input_ids"].masked_fill(torch.arange(24) < first, -100)
    # What padding predicts is nobody's.
    given["labels"][:, 1:][given["attention_mask"][:, :-1] == 0] = -100
    given["prompt_mask"] = given["attention_mask"]
    return given


def only(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a labelled batch with its media."""
    keep = given["attention_mask"][row].bool()
    return row_of(given, row) | {name: given[name][row, keep][None] for name in ("labels", "prompt_mask")}


def alone(model: Any, given: dict[str, torch.Tensor], row: int, branch: str) -> torch.Tensor:
    """What each label token of a row loses by early fusion of the same weights, the other media masked away."""
    one = only(given, row)
    seen = torch.ones_like(one["input_ids"])
    for token in HIDDEN[branch]:
        seen[one["input_ids"] == token] = 0
    early = model_of("early")
    early.load_state_dict(model.state_dict(), strict=False)
    labels, media = one.pop("labels"), {**one, "attention_mask": seen}
    found = log_probs(early, media, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    losses = functional.cross_entropy(found[0, :-1], labels[0, 1:], reduction="none")
    return losses[labels[0, 1:] != -100]


@pytest.mark.parametrize("way", WEIGHED)
def test_it_is_the_mixture_and_the_mean_of_passes_run_alone(way: str) -> None:
    model, given = model_of(way, auxiliary_loss=SHARE, instruction=False), labelled()
    mixture, rows, _ = answer_losses(model, given)
    expected, sums = [], dict.fromkeys(HIDDEN, (0.0, 0))
    for row, branches in enumerate(WEIGHED[way]):
        own = {branch: alone(model, given, row, branch) for branch in branches}
        mean = torch.stack(list(own.values())).mean(0)
        expected.append((1 - SHARE) * mixture[rows == row] + SHARE * mean)
        for branch, losses in own.items():
            sums[branch] = (sums[branch][0] + float(losses.detach().sum()), sums[branch][1] + len(losses))
    found, _, said = answer_losses(model.train(), given)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    total, count = answer_loss(model, given)
    torch.testing.assert_close(total, found.sum())
    assert count == len(found)
    logged = {name: value for one, _ in said for name, value in one.items()}
    wanted = {f"loss_alone_{branch}": total / count for branch, (total, count) in sums.items() if count}
    assert logged == pytest.approx({"loss_mixture": float(mixture.detach().mean()), **wanted}, rel=1e-5)
    assert [weight for _, weight in said] == [len(found), *(count for _, count in sums.values() if count)]


@pytest.mark.parametrize("way", ["late", "hybrid", "hybrid_co", "late_self"])
@pytest.mark.parametrize("first", [18, 1], ids=["answers behind the media", "also before"])
def test_a_row_loses_the_same_in_any_company(way: str, first: int) -> None:
    """What branches share a pass, or a beginning, depends on the batch."""
    model, given = model_of(way, auxiliary_loss=SHARE).train(), labelled(first)
    together, rows, _ = answer_losses(model, given)
    for row in range(3):
        torch.testing.assert_close(
            together[rows == row], answer_losses(model, only(given, row))[0], rtol=1e-5, atol=1e-5
        )


def test_where_one_pass_is_all_nothing_is_added() -> None:
    model, words = model_of("late", auxiliary_loss=1.0), only(labelled(), 2)
    mixture = answer_losses(model, words)[0]
    found, _, said = answer_losses(model.train(), words)
    torch.testing.assert_close(found, mixture)
    assert {name for one, _ in said for name in one} == {"loss_mixture", "loss_alone_image", "loss_alone_audio"}


@pytest.mark.parametrize("way", WEIGHED)
def test_off_and_held_out_it_is_the_mixtures_to_the_last_bit(way: str) -> None:
    given = labelled()
    plain, apart = model_of(way), model_of(way, auxiliary_loss=SHARE)
    expected = answer_loss(plain, given)[0]
    assert torch.equal(answer_loss(plain.train(), given)[0], expected)
    assert torch.equal(answer_loss(apart, given)[0], expected)
    assert not torch.equal(answer_loss(apart.train(), given)[0], expected)
    losses, _, said = answer_losses(plain, given)
    assert said == [] and torch.equal(losses, answer_losses(apart.eval(), given)[0])


def test_the_weaker_pass_learns_from_rows_that_the_other_knows() -> None:
    """By the mixture alone its gradient is its responsibility for the answer, a hundredth of what it has to learn."""
    wrong, known = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    log_gate, target = torch.full((1, 2), math.log(0.5)), torch.tensor([1])

    def gradient(share: float) -> torch.Tensor:
        weak = wrong.clone().requires_grad_()
        parts = [weak.log_softmax(-1), known.log_softmax(-1)]
        own = torch.stack([-part[:, 1] for part in parts], dim=1)
        mixture = functional.cross_entropy(mix(log_gate, parts), target, reduction="none")
        blended(mixture, own, torch.ones(1, 2, dtype=torch.bool), share).sum().backward()
        assert weak.grad is not None
        return weak.grad

    full = wrong.softmax(-1) - functional.one_hot(target, 3)
    assert float(gradient(0.0).norm() / full.norm()) < 0.02
    torch.testing.assert_close(gradient(1.0), full / 2)
    torch.testing.assert_close(gradient(0.5), gradient(0.0) / 2 + full / 4)


@pytest.mark.parametrize("way", WEIGHED)
def test_transformers_own_call_loses_the_same(way: str) -> None:
    model, given = model_of(way, auxiliary_loss=SHARE, instruction=False), labelled()
    torch.testing.assert_close(model(**given).loss, answer_loss(model, given)[0] / 18)
    total, count = answer_loss(model.train(), given)
    assert count == 18
    torch.testing.assert_close(model(**given).loss, total / 18)
    torch.testing.assert_close(model(**given, num_items_in_batch=36).loss, total / 36)


@pytest.mark.parametrize("way", ["late", "hybrid"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_changes_no_gradient(way: str, method: str) -> None:
    model, given = deepcopy(model_of(way, auxiliary_loss=SHARE)), labelled()
    if method == "lora":
        model = with_method(model, "lora", towers=("llm",), lora=LORA, virtual_tokens=0, base_path="base")
    model.train()

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss, _ = answer_loss(model, given)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-5)
    assert error(found[1], expected[1]) < 2e-5 and len(expected[1]) > 0


def test_behind_virtual_tokens() -> None:
    """They stand before the others in what the gate says, too."""
    model = model_of("late", auxiliary_loss=1.0)
    model = with_method(model, "prompt", towers=("llm",), lora=LORA, virtual_tokens=3, base_path="base").eval()
    one = only(labelled(1), 0)
    own = {}
    for branch in ("image", "audio"):
        with only_branch(model, branch):
            own[branch] = answer_losses(model, one)[0]
    found, both = answer_losses(model.train(), one)[0], (own["image"] + own["audio"]) / 2
    # A picture stands from 3 on, a sound from 9: between them the sound's branch has nothing to say.
    expected = torch.cat((both[:3], own["image"][3:9], both[9:]))
    assert not torch.allclose(own["image"], own["audio"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"auxiliary_loss": 0.5}, "late and hybrid: early fusion has one pass"),
        ({"mode": "late", "auxiliary_loss": 1.5}, "in \\[0, 1\\]"),
    ],
)
def test_wrong_settings_are_refused(fusion: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompositeConfig(text_config=model_of("early").config.text_config, fusion=fusion)
