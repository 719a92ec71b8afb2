"""What tokens are along the paths of rows in which every shared beginning stands once.

A token tree and a trie are such rows: a conversation is a path through one, and several may stand one after the
other in a row of a batch. Whatever depends on what came before (positions, turns, the media of a conversation) is
asked of every path as of a row of its own, so sharing changes nothing. Shapes: B rows of a batch, T tokens, N images,
M sounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan
from mmtune.models.rope_index import RopeIndex


class Forked(Protocol):
    """Conversations whose shared beginnings stand once."""

    @property
    def input_ids(self) -> np.ndarray:
        """``(T,)``."""

    @property
    def media(self) -> tuple[MediaSpan, ...]:
        """Every medium once, in the order of the tokens."""

    def paths(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields where each conversation's tokens stand, in order, and how many it shares with the one before."""


ForkedT = TypeVar("ForkedT", bound=Forked)


def along_paths(
    bins: Sequence[Sequence[ForkedT]], length: int, found: Callable[[ForkedT, np.ndarray], np.ndarray]
) -> torch.Tensor:
    """Returns ``(B, T)`` int64 what is found for every token along the paths that it stands on; 0 at padding.

    Args:
        bins: What stands in each row of the batch, one after the other.
        length: T.
        found: Given one of them and where a path's tokens stand in it, a value for each.
    """
    values_BT = np.zeros((len(bins), length), dtype=np.int64)
    for row, forked in enumerate(bins):
        at = 0
        for one in forked:
            for path, _ in one.paths():
                values_BT[row, at + path] = found(one, path)
            at += one.input_ids.size
    return torch.from_numpy(values_BT)


def image_runs(types_BT: np.ndarray) -> np.ndarray:
    """Returns ``(B, T)`` a number for each run of image tokens, where the types are 1; -1 elsewhere."""
    image_BT = types_BT == 1
    starts = image_BT & ~np.pad(image_BT, ((0, 0), (1, 0)))[:, :-1]
    return np.where(image_BT, np.cumsum(starts, axis=1) - 1, -1)


def sharing_conversations(forked: Forked) -> Iterator[EncodedRow]:
    """Yields the media of conversations that share any, every medium once.

    Some families cut an image that is alone in its conversation into tiles, so the media of conversations that
    share none are kept apart. Where some share one, either all of them show others too or none does, or the shared
    tokens would differ.
    """
    labels = np.full_like(forked.input_ids, IGNORED)
    group: list[MediaSpan] = []
    for path, shared in forked.paths():
        before, own = path[:shared], path[shared:]
        if group and not np.isin([span.start for span in group], before).any():
            yield EncodedRow(forked.input_ids, labels, tuple(group))
            group = []
        group += [span for span in forked.media if own[0] <= span.start <= own[-1]] if own.size else []
    if group:
        yield EncodedRow(forked.input_ids, labels, tuple(group))


def rope_positions(
    bins: Sequence[Sequence[Forked]],
    places_BT: torch.Tensor,
    rope: RopeIndex | None,
    types_BT: torch.Tensor | None,
    batch: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Returns the positions of every token: on every path those of its conversation in a row of its own.

    They are the places ``(B, T)``, or ``(3, B, T)`` where a family has 3-D positions and the batch has images.

    Args:
        bins: What stands in each row of the batch, one after the other.
        places_BT: Each token's place on its path.
        rope: The family's 3-D positions, or None.
        types_BT: The family's ``mm_token_type_ids``, or None.
        batch: With the media tensors.
    """
    grids = batch.get("image_grid_thw")
    if rope is None or grids is None:
        return places_BT
    masks = batch.get("feature_attention_mask")
    sounds = None if masks is None else masks.sum(-1)
    positions = places_BT.repeat(3, 1, 1)
    for row, forked in enumerate(bins):
        at = 0
        for one in forked:
            inside = slice(at, at + one.input_ids.size)
            audio = np.array([span.medium.modality == "audio" for span in one.media], dtype=bool)
            images, heard = int((~audio).sum()), int(audio.sum())
            types = None if types_BT is None else types_BT[row, inside]
            facts = _Facts(types, grids[:images], None if sounds is None else sounds[:heard], audio)
            positions[:, row, inside] = _positions(one, rope, facts)
            grids, sounds = grids[images:], None if sounds is None else sounds[heard:]
            at = inside.stop
    return positions


@dataclass(frozen=True)
class _Facts:
    """What the family's positions of a tree or trie depend on.

    Attributes:
        types: ``(T,)`` token types, where the family has them.
        grids: ``(N, 3)`` of its images.
        sounds: ``(M,)`` lengths of its sounds, where the batch has any.
        audio: ``(N + M,)`` whether a medium is a sound.
    """

    types: torch.Tensor | None
    grids: torch.Tensor
    sounds: torch.Tensor | None
    audio: np.ndarray

    def of(self, path: np.ndarray, on_path: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns what the family is told of the tokens of a path; ``on_path`` tells the media that stand there."""
        told: dict[str, torch.Tensor] = {}
        if self.types is not None:
            told["mm_token_type_ids"] = self.types[None, path]
        if on_path[~self.audio].any():
            told["image_grid_thw"] = self.grids[on_path[~self.audio]]
        if self.sounds is not None:
            told["audio_seqlens"] = self.sounds[on_path[self.audio]]
        return told


def _positions(forked: Forked, rope: RopeIndex, facts: _Facts) -> torch.Tensor:
    """Returns the ``(3, T)`` positions of a tree or trie.

    The family is asked for paths that add a medium; any other text counts on from the highest position before it.
    """
    ids = torch.from_numpy(forked.input_ids.astype(np.int64))
    found = torch.zeros(3, ids.numel(), dtype=torch.int64)
    homes = np.array([span.start for span in forked.media], dtype=np.int64)
    for path, shared in forked.paths():
        before, own = path[:shared], path[shared:]
        if np.isin(homes, own).any():
            found[:, own] = rope(ids[path], facts.of(path, np.isin(homes, path)))[:, shared:]
        else:
            start = int(found[:, before].max()) + 1 if shared else 0
            found[:, own] = start + torch.arange(own.size)
    return found
