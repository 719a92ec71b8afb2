"""Learned vectors in the middle of a text: ids above the vocabulary, which the embedding layer turns into them.

Templates that mix fixed words and learned ones (Liu et al. 2021, arXiv:2103.10385; OpenPrompt's mixed template) say
where such tokens stand. They are ordinary places of a row, so positions, masks, trees and padding know nothing of
them, and every family can have them. The base's own weights are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtune.errors import DataError, IntegrityError
from mmtune.records import SOFT_ID

FILE = "soft_tokens.safetensors"
"""Where an adapter folder holds them."""


class SoftTokens(nn.Module):
    """N vectors of the model's width.

    Args:
        vectors: ``(N, H)`` what they start as.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors.float().clone())
        self._soft: torch.Tensor | None = None

    def hide(self, _: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Keeps the soft ids of a call from the table, which has no row for them."""
        ids, *rest = given
        soft = ids - SOFT_ID
        self._soft = soft
        return (ids.masked_fill(soft >= 0, 0), *rest)

    def put(self, _: nn.Module, given: tuple[torch.Tensor, ...], embeds: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings with the learned vectors in their places.

        Raises:
            DataError: A row has a soft token that was never trained.
        """
        soft, self._soft = self._soft, None
        assert soft is not None
        where = soft >= 0
        if not bool(where.any()):
            return embeds
        numbers = soft[where]
        if int(numbers.max()) >= len(self.weight):
            raise DataError(
                f"a row has soft token {int(numbers.max()) + 1}, the model has {len(self.weight)}",
                "ask with the templates of training, or tune again",
                "unknown_soft_token",
            )
        return embeds.index_put((where,), self.weight[numbers].to(embeds.dtype))


def add_soft_tokens(model: Any, vectors: torch.Tensor) -> Any:
    """Lets the embedding layer of a model know soft tokens, in place; returns the same model.

    Args:
        model: A transformers model; adapters may be put around it later.
        vectors: ``(N, H)`` what they start as; they train.
    """
    embeddings = model.get_input_embeddings()
    soft = SoftTokens(vectors.to(embeddings.weight.device))
    embeddings.register_forward_pre_hook(soft.hide)
    embeddings.register_forward_hook(soft.put)
    embeddings.soft_tokens = soft
    return model


def soft_tokens(model: Any) -> SoftTokens | None:
    """Returns the soft tokens of a model, or None."""
    return getattr(model.get_input_embeddings(), "soft_tokens", None)


def labels_first(
    embed: Callable[[torch.Tensor], torch.Tensor], vectors_VH: torch.Tensor, label_ids: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Returns ``(V, H)`` vectors whose first are labels: the mean of the embeddings of a label's tokens.

    Args:
        embed: Tokens ``(N,)`` to their embeddings ``(N, H)``.
        vectors_VH: What stands behind the labels; of more than V labels the last are left out.
        label_ids: Tokens of every label.
    """
    device = vectors_VH.device
    labels = [embed(torch.tensor(list(own), device=device)).mean(0) for own in label_ids[: len(vectors_VH)]]
    return torch.stack([*labels, *vectors_VH[len(labels) :]])


def first_vectors(
    model: Any,
    count: int,
    init: str = "random",
    text_ids: Sequence[int] = (),
    label_ids: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """Returns the ``(count, H)`` vectors that soft tokens start as.

    Args:
        model: The base model.
        count: How many.
        init: ``random`` draws from a normal distribution as PEFT does, ``vocabulary`` takes embeddings of drawn
            tokens, ``labels`` those of labels before them, ``text`` those of a text, cut or repeated to fit.
        text_ids: Tokens of the text.
        label_ids: Tokens of every label.
    """
    embeddings = model.get_input_embeddings()
    if init == "random":
        return torch.randn(count, embeddings.weight.shape[1])
    known = torch.tensor(list(text_ids)) if text_ids else torch.randint(0, embeddings.num_embeddings, (count,))
    ids = known.repeat(-(-count // len(known)))[:count]
    with torch.no_grad():
        return labels_first(embeddings, embeddings(ids.to(embeddings.weight.device)), label_ids).float()


def save_soft_tokens(soft: SoftTokens, folder: Path) -> None:
    """Writes the vectors into an adapter folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": soft.weight.detach().cpu().contiguous()}, folder / FILE)


def load_soft_tokens(model: Any, folder: Path) -> Any:
    """Gives a base model the soft tokens of an adapter folder, in place; returns the same model.

    Raises:
        IntegrityError: They are of another width.
    """
    from safetensors.torch import load_file

    vectors = load_file(folder / FILE)["weight"]
    width = model.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != width:
        raise IntegrityError(
            f"{folder / FILE} holds vectors of width {vectors.shape[1]}, the model's is {width}", "tune it again"
        )
    return add_soft_tokens(model, vectors)
