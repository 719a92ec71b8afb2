"""Policy gradient over the words of a prompt, with a frozen model's rewards (after RLPrompt, arXiv:2205.12548).

A step draws a group of prompts that were not tried before, earns their rewards on the same rows, and follows the
gradient of the expected z-score: REINFORCE, in which the mean of all prompts so far is the baseline. (The paper learns
by soft Q-learning; its reward, its z-score, the fixed length and the top-k draw are kept.)

Shapes: C prompts, P positions, V words, D width of their embeddings, N rows of a step, R dev rows, T prompts so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.look import look, look_blindly, look_calls, look_rows
from mmtune.prompts.search.policy import Policy, Weights, fresh_policy, gradient, greedy, sample
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.reward import z_scores
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission, slots_of

_TRIES = 64
"""So many rounds of draws per group; a policy that then knows no new prompt has settled."""
_BETAS, _TINY = (0.9, 0.999), 1e-8
"""Adam's (arXiv:1412.6980)."""


@dataclass(frozen=True)
class RlSettings:
    """The words of a prompt, and how the policy learns.

    Attributes:
        words: What a prompt is made of.
        embedding_VD: Their embeddings, frozen.
        say: Word numbers to the text of a prompt; empty where it must not or cannot be said. None puts spaces
            between the words.
        length: Words of a prompt.
        top_k: A word is drawn from so many likeliest at its position; 0 is all.
        hidden: Units of the MLP over the embedding of the word before; 0 leaves plain logits of every position.
        rate: Adam's step size.
        entropy: Weight of the entropy.
    """

    words: tuple[str, ...]
    embedding_VD: np.ndarray
    say: Callable[[Sequence[int]], str] | None = None
    length: int = 4
    top_k: int = 0
    hidden: int = 32
    rate: float = 0.5
    entropy: float = 0.3


@dataclass(frozen=True)
class Learner:
    """A policy and the moments of its gradients after so many steps."""

    policy: Policy
    first: Weights
    second: Weights
    steps: int = 0


def fresh_learner(settings: RlSettings, seed: int) -> Learner:
    """Returns the learner that knows nothing."""
    policy = fresh_policy(
        settings.embedding_VD, length=settings.length, hidden=settings.hidden, top_k=settings.top_k, seed=seed
    )
    zeros = {name: np.zeros_like(value) for name, value in policy.weights.items()}
    return Learner(policy, zeros, zeros)


def learn(learner: Learner, ids_CP: np.ndarray, advantage_C: np.ndarray, settings: RlSettings) -> Learner:
    """Returns the learner after one step up the gradient; with the same weights where no prompt was better.

    Args:
        learner: Before.
        ids_CP: Word numbers of the group.
        advantage_C: Its prompts' advantages.
        settings: Rate and entropy.
    """
    if not advantage_C.any():
        return replace(learner, steps=learner.steps + 1)
    slope = gradient(learner.policy, ids_CP, advantage_C / len(ids_CP), settings.entropy)
    steps = learner.steps + 1
    first = {name: _BETAS[0] * learner.first[name] + (1 - _BETAS[0]) * value for name, value in slope.items()}
    second = {name: _BETAS[1] * learner.second[name] + (1 - _BETAS[1]) * value**2 for name, value in slope.items()}
    scale = np.sqrt(1 - _BETAS[1] ** steps) / (1 - _BETAS[0] ** steps)
    weights = {
        name: value + settings.rate * scale * first[name] / (np.sqrt(second[name]) + _TINY)
        for name, value in learner.policy.weights.items()
    }
    return Learner(replace(learner.policy, weights=weights), first, second, steps)


def prompt_of(ids_P: Sequence[int] | np.ndarray, problem: Problem) -> Candidate | None:
    """Returns the prompt of these words; None where they cannot be said.

    They stand before the start's instruction, or in its place where it names no slot of a row.
    """
    settings: RlSettings = problem.settings
    numbers = [int(number) for number in ids_P]
    said = settings.say(numbers) if settings.say else " ".join(settings.words[number] for number in numbers)
    said = said.replace("{", "{{").replace("}", "}}")
    start = problem.space.start
    if not said.strip():
        return None
    return replace(start, instruction=f"{said} {start.instruction}" if slots_of(start.instruction) else said)


def draw_group(learner: Learner, problem: Problem, admission: Admission) -> tuple[np.ndarray, list[Candidate]]:
    """Returns ``(C, P)`` word numbers and prompts that were not tried before, at most a population."""
    rng = np.random.default_rng([problem.seed, 1, learner.steps])
    rows: list[np.ndarray] = []
    prompts: list[Candidate] = []
    for _ in range(_TRIES):
        for ids_P in sample(learner.policy, problem.population - len(prompts), rng):
            prompt = prompt_of(ids_P, problem)
            if prompt is None:
                admission.refused["unsayable"] += 1
            elif fresh := admission([prompt]):
                rows.append(ids_P)
                prompts += fresh
        if len(prompts) == problem.population:
            break
    return np.array(rows), prompts


def rl_search(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Learns until the budget is used up or the policy has settled; what it likes best is scored on all rows."""
    settings: RlSettings = problem.settings
    learner, dice = fresh_learner(settings, problem.seed), problem.dice("rl")
    tried_TR = np.empty((0, problem.rows))
    while scorer.budget.left >= look_calls(problem, problem.population) + problem.rows:
        ids_CP, prompts = draw_group(learner, problem, admission)
        if not prompts:
            break
        rows = look_rows(problem, dice)
        reward_CN = look(scorer, prompts, rows)
        group_CR = np.full((len(prompts), problem.rows), np.nan)
        group_CR[:, rows] = reward_CN
        tried_TR = np.concatenate([tried_TR, group_CR])
        # Among all prompts so far, not the group alone: half of a group of good prompts is not bad.
        learner = learn(learner, ids_CP, z_scores(reward_CN, tried_TR[:, rows]).mean(1), settings)
    liked = prompt_of(greedy(learner.policy), problem)
    if liked is not None and not problem.space.fault(liked):
        scorer(liked)


def random_words(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Looks at prompts of words drawn at random until the budget or the prompts are used up."""
    learner = fresh_learner(problem.settings, problem.seed)

    def draw(count: int) -> list[Candidate]:
        nonlocal learner
        _, prompts = draw_group(learner, replace(problem, population=count), admission)
        learner = replace(learner, steps=learner.steps + 1)
        return prompts

    look_blindly(problem, scorer, draw)


METHOD = Method(rl_search, lambda problem: look_calls(problem, problem.population) + problem.rows, random=random_words)
