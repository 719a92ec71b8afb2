"""Policy gradient over the words of a prompt, with a frozen model's rewards (after RLPrompt, arXiv:2205.12548).

A step draws a group of prompts that were not scored before, earns their rewards on the same inputs, and follows the
gradient of the expected z-score: REINFORCE, in which the mean of all prompts so far is the baseline. (The paper learns
by soft Q-learning; the reward, the z-score, the fixed length and the top-k draw are its own.) Nothing is random but
the dice of (seed, step), so the same rewards lead to the same prompts: a search that was stopped is replayed by
answering again what was answered before.

Shapes: C prompts, P positions, N inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmtune.prompts.search.policy import Policy, Weights, fresh_policy, gradient, sample
from mmtune.prompts.search.reward import check_finite, z_scores

Ids = tuple[int, ...]
"""Word numbers of a prompt."""
_TRIES = 64
"""So many draws per wanted prompt; a policy that then knows no more new ones has settled."""
_BETAS, _TINY = (0.9, 0.999), 1e-8
"""Adam's (arXiv:1412.6980)."""


@dataclass(frozen=True, slots=True)
class RlSettings:
    """How the policy learns.

    Attributes:
        length: Words of a prompt.
        group: Prompts per step.
        top_k: A word is drawn from so many likeliest at its position; 0 is all.
        hidden: Units of the MLP over the embedding of the word before; 0 leaves plain logits of every position.
        rate: Adam's step size.
        entropy: Weight of the entropy.
    """

    length: int = 4
    group: int = 8
    top_k: int = 0
    hidden: int = 0
    rate: float = 0.3
    entropy: float = 0.01


@dataclass(frozen=True)
class Learner:
    """A policy and the moments of its gradients after so many steps."""

    policy: Policy
    first: Weights
    second: Weights
    steps: int = 0


@dataclass(frozen=True)
class Group:
    """The prompts of a step.

    Attributes:
        ids: New prompts that may be scored.
        refused: Reason to the number of draws that were thrown away.
    """

    ids: list[Ids]
    refused: Mapping[str, int] = field(default_factory=dict)


def fresh_learner(embedding_VD: np.ndarray, settings: RlSettings, seed: int) -> Learner:
    """Returns the learner that knows nothing.

    Args:
        embedding_VD: One row per word.
        settings: How it learns.
        seed: Of its first weights.
    """
    policy = fresh_policy(
        embedding_VD, length=settings.length, hidden=settings.hidden, top_k=settings.top_k, seed=seed
    )
    zeros = {name: np.zeros_like(value) for name, value in policy.weights.items()}
    return Learner(policy, zeros, zeros)


def draw_group(learner: Learner, count: int, seed: int, refuse: Callable[[Ids], str]) -> Group:
    """Returns up to ``count`` different prompts; fewer where the policy knows no more.

    Args:
        learner: What draws.
        count: Prompts that are wanted.
        seed: With the learner's steps, the dice.
        refuse: A prompt to the reason why it may not be scored, or nothing.
    """
    rng = np.random.default_rng([seed, 1, learner.steps])
    found: dict[Ids, None] = {}
    refused: Counter[str] = Counter()
    for _ in range(_TRIES):
        for row in sample(learner.policy, count, rng):
            ids = tuple(int(value) for value in row)
            reason = "duplicate" if ids in found else refuse(ids)
            if reason:
                refused[reason] += 1
            elif len(found) < count:
                found[ids] = None
        if len(found) == count:
            break
    return Group(list(found), dict(refused))


def learn(learner: Learner, ids: Sequence[Ids], advantage_C: np.ndarray, settings: RlSettings) -> Learner:
    """Returns the learner after one step up the gradient; unchanged weights where nothing was better than another.

    Args:
        learner: Before.
        ids: The group.
        advantage_C: Its prompts' advantages.
        settings: Rate and entropy.
    """
    if not advantage_C.any():
        return replace(learner, steps=learner.steps + 1)
    slope = gradient(learner.policy, np.array(ids), advantage_C / len(ids), settings.entropy)
    steps = learner.steps + 1
    first = {name: _BETAS[0] * learner.first[name] + (1 - _BETAS[0]) * value for name, value in slope.items()}
    second = {name: _BETAS[1] * learner.second[name] + (1 - _BETAS[1]) * value**2 for name, value in slope.items()}
    scale = np.sqrt(1 - _BETAS[1] ** steps) / (1 - _BETAS[0] ** steps)
    weights = {
        name: value + settings.rate * scale * first[name] / (np.sqrt(second[name]) + _TINY)
        for name, value in learner.policy.weights.items()
    }
    return Learner(replace(learner.policy, weights=weights), first, second, steps)


def search_words(
    embedding_VD: np.ndarray,
    score: Callable[[Sequence[Ids]], np.ndarray],
    *,
    settings: RlSettings,
    most: int,
    seed: int,
    refuse: Callable[[Ids], str] = lambda ids: "",
) -> tuple[dict[Ids, np.ndarray], dict[str, int]]:
    """Returns the rewards of every prompt that was scored, in order, and why draws were thrown away.

    Args:
        embedding_VD: One row per word.
        score: Prompts to ``(C, N)`` rewards on the same N inputs.
        settings: How the policy learns.
        most: Prompts that may be scored.
        seed: Of everything random.
        refuse: A prompt to the reason why it may not be scored, or nothing.

    Raises:
        DivergedError: A reward is no number.
    """
    learner = fresh_learner(embedding_VD, settings, seed)
    known: dict[Ids, np.ndarray] = {}
    refused: Counter[str] = Counter()
    while len(known) < most:
        group = draw_group(
            learner,
            min(settings.group, most - len(known)),
            seed,
            lambda ids: "duplicate" if ids in known else refuse(ids),
        )
        refused.update(group.refused)
        if not group.ids:
            break
        reward_CN = score(group.ids)
        check_finite(reward_CN, [str(ids) for ids in group.ids])
        known.update(zip(group.ids, reward_CN, strict=True))
        # Against all prompts so far, not the group alone: a group of good prompts must not count half of them as bad.
        advantage_C = z_scores(np.stack(list(known.values())))[-len(group.ids) :].mean(1)
        learner = learn(learner, group.ids, advantage_C, settings)
    return known, dict(refused)
