"""A small policy over the words of a prompt, in NumPy: samples, log-probabilities and their gradient.

As in RLPrompt (arXiv:2205.12548, section 2.3) everything big is frozen: the embedding of the word before goes through
a small MLP, and what comes out meets the embeddings of all words. Every position also has logits of its own, which
is the whole policy where ``hidden`` is 0.

Shapes: C prompts, P positions, V words, D width of the embeddings, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Weights = Mapping[str, np.ndarray]
"""``place_PV``; with hidden units also ``in_DH``, ``shift_PH`` and ``out_HD``."""


@dataclass(frozen=True)
class Policy:
    """A distribution over prompts of P words.

    Attributes:
        embedding_VD: Frozen, of unit length.
        weights: What learns.
        top_k: A word is drawn from so many likeliest at its position; 0 is all.
    """

    embedding_VD: np.ndarray
    weights: Weights
    top_k: int = 0

    @property
    def length(self) -> int:
        """Words of a prompt, P."""
        return len(self.weights["place_PV"])


def fresh_policy(embedding_VD: np.ndarray, *, length: int, hidden: int, top_k: int, seed: int) -> Policy:
    """Returns the policy that finds all prompts equally likely.

    Args:
        embedding_VD: One row per word; centred and scaled to unit length here.
        length: Words of a prompt.
        hidden: Units of the MLP; 0 leaves it out.
        top_k: Words to draw from at a position; 0 is all.
        seed: Of the MLP's first layer.
    """
    words, width = embedding_VD.shape
    centred_VD = embedding_VD.astype(np.float64) - embedding_VD.mean(0, dtype=np.float64)
    size_V1 = np.linalg.norm(centred_VD, axis=1, keepdims=True)
    unit_VD = centred_VD / np.where(size_V1 > 0, size_V1, 1.0)
    weights = {"place_PV": np.zeros((length, words))}
    if hidden:
        rng = np.random.default_rng([seed, 0])
        weights["in_DH"] = rng.normal(size=(width, hidden))
        weights["shift_PH"] = rng.normal(size=(length, hidden))
        weights["out_HD"] = np.zeros((hidden, width))
    return Policy(unit_VD, weights, top_k)


def sample(policy: Policy, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns ``(C, P)`` word numbers of prompts drawn word by word.

    Args:
        policy: Where from.
        count: C.
        rng: The dice.
    """
    ids_CP = np.zeros((count, policy.length), dtype=np.int64)
    for place in range(policy.length):
        logprob_CV = _logprobs(policy, ids_CP)[:, place]
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        ids_CP[:, place] = (logprob_CV + rng.gumbel(size=logprob_CV.shape)).argmax(1)
    return ids_CP


def greedy(policy: Policy) -> np.ndarray:
    """Returns ``(P,)`` word numbers of the prompt that takes the likeliest word at every position."""
    ids_1P = np.zeros((1, policy.length), dtype=np.int64)
    for place in range(policy.length):
        ids_1P[0, place] = _logprobs(policy, ids_1P)[0, place].argmax()
    return ids_1P[0]


def log_probability(policy: Policy, ids_CP: np.ndarray) -> np.ndarray:
    """Returns ``(C,)`` log-probabilities of prompts; -inf for one that ``top_k`` never draws."""
    taken_CP1 = np.take_along_axis(_logprobs(policy, ids_CP), ids_CP[..., None], axis=2)
    return taken_CP1.sum((1, 2))


def entropy(policy: Policy, ids_CP: np.ndarray) -> float:
    """Returns the entropy of the words' distributions, in nats, summed over positions, the mean over prompts."""
    logprob_CPV = _logprobs(policy, ids_CP)
    return float(_entropy(logprob_CPV).sum(1).mean())


def gradient(policy: Policy, ids_CP: np.ndarray, weight_C: np.ndarray, bonus: float) -> dict[str, np.ndarray]:
    """Returns the gradient of ``sum(weight * log_probability) + bonus * entropy`` in the policy's weights.

    Args:
        policy: At which point.
        ids_CP: Prompts.
        weight_C: Their advantages.
        bonus: Weight of the entropy.
    """
    before_CPD, hidden_CPH = _inside(policy, ids_CP)
    logprob_CPV = _logprobs(policy, ids_CP)
    probability_CPV = np.exp(logprob_CPV)
    # A word outside of the top k has probability 0 and no gradient.
    finite_CPV = np.where(probability_CPV > 0, logprob_CPV, 0.0)
    taken_CPV = np.zeros_like(probability_CPV)
    np.put_along_axis(taken_CPV, ids_CP[..., None], 1.0, axis=2)
    slope_CPV = weight_C[:, None, None] * (taken_CPV - probability_CPV)
    spread_CP1 = _entropy(logprob_CPV)[..., None]
    slope_CPV -= (bonus / len(ids_CP)) * probability_CPV * (finite_CPV + spread_CP1)
    out = {"place_PV": slope_CPV.sum(0)}
    if hidden_CPH is not None:
        back_CPD = slope_CPV @ policy.embedding_VD * _scale(policy)
        out["out_HD"] = np.einsum("cph,cpd->hd", hidden_CPH, back_CPD)
        back_CPH = back_CPD @ policy.weights["out_HD"].T * (1.0 - hidden_CPH**2)
        out["shift_PH"] = back_CPH.sum(0)
        out["in_DH"] = np.einsum("cpd,cph->dh", before_CPD, back_CPH)
    return out


def _scale(policy: Policy) -> float:
    """Returns what makes a step of Adam move a logit by its step size at most, whatever the widths."""
    hidden, width = policy.weights["out_HD"].shape
    return 1.0 / (hidden * math.sqrt(width))


def _entropy(logprob_CPV: np.ndarray) -> np.ndarray:
    probability_CPV = np.exp(logprob_CPV)
    return -(probability_CPV * np.where(probability_CPV > 0, logprob_CPV, 0.0)).sum(2)


def _inside(policy: Policy, ids_CP: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the embeddings before every position, and the hidden units; nothing stands before the first word."""
    embedded_CPD = policy.embedding_VD[ids_CP]
    before_CPD = np.concatenate([np.zeros_like(embedded_CPD[:, :1]), embedded_CPD[:, :-1]], axis=1)
    if "in_DH" not in policy.weights:
        return before_CPD, None
    return before_CPD, np.tanh(before_CPD @ policy.weights["in_DH"] + policy.weights["shift_PH"])


def _logprobs(policy: Policy, ids_CP: np.ndarray) -> np.ndarray:
    """Returns ``(C, P, V)`` log-probabilities of every word behind the words before it."""
    _, hidden_CPH = _inside(policy, ids_CP)
    logits_CPV = np.broadcast_to(policy.weights["place_PV"], (len(ids_CP), *policy.weights["place_PV"].shape))
    if hidden_CPH is not None:
        logits_CPV = logits_CPV + hidden_CPH @ policy.weights["out_HD"] @ policy.embedding_VD.T * _scale(policy)
    words = logits_CPV.shape[2]
    if 0 < policy.top_k < words:
        least_CP1 = np.partition(logits_CPV, words - policy.top_k, axis=2)[..., words - policy.top_k, None]
        logits_CPV = np.where(logits_CPV >= least_CP1, logits_CPV, -np.inf)
    shifted_CPV = logits_CPV - logits_CPV.max(2, keepdims=True)
    return shifted_CPV - np.log(np.exp(shifted_CPV).sum(2, keepdims=True))
