"""Tries to one batch of tensors and to the mask under which every row sees its own path alone.

Shapes: B tries, T tokens, V virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan
from mmtune.encoding.trie import Trie
from mmtune.models.mask_rules import MaskRules, in_form
from mmtune.models.rope_index import RopeIndex
from mmtune.models.soft_prompt import is_prefix, run_behind_virtual_tokens, virtual_tokens

LAYOUT = ("ends", "places", "images", "hidden", "asks")
"""``(B, T)`` each: see ``Trie``; a number for each run of image tokens that see each other both ways, -1
elsewhere; whether the token is padding or of a modality that is taken for missing, so that it sees and is seen by
itself alone; whether the token predicts a label."""


def trie_batch(tries: Sequence[Trie], collate: Collator, rope: RopeIndex | None) -> dict[str, torch.Tensor]:
    """Returns what the family's model takes of tries, with ``position_ids`` and what ``LAYOUT`` names.

    Args:
        tries: One row of the batch each.
        collate: Makes the family's tensors of plain rows; pads on the right.
        rope: The family's 3-D positions, or None.

    Raises:
        IntegrityError: A medium now takes another number of tokens than when it was encoded.
    """
    packed = [EncodedRow(trie.input_ids, np.full_like(trie.input_ids, IGNORED), trie.media) for trie in tries]
    batch = collate.text(packed)
    hidden = batch.pop("attention_mask") == 0
    del batch["labels"]
    length = batch["input_ids"].shape[1]
    shown = packed if collate.media_by_row else [own for trie in tries for own in _conversations(trie)]
    batch |= collate.media(shown)
    types = batch.pop("token_type_ids", None)
    alone = np.broadcast_to(np.arange(length), (len(tries), length))
    places = _filled([trie.places for trie in tries], np.zeros_like(alone))
    batch |= {
        "ends": _filled([trie.ends for trie in tries], alone + 1),
        "places": places,
        "images": torch.full_like(places, -1) if types is None else _runs(types, tries),
        "hidden": hidden,
        "asks": _filled([_asking(trie) for trie in tries], np.zeros_like(alone)).bool(),
    }
    if "prompt_mask" in batch:
        batch["prompt_mask"] = _filled([trie.prompt for trie in tries], np.zeros_like(alone))
    if collate.user_turns is not None:
        turns = [_along_paths(trie, collate.user_turns) for trie in tries]
        batch["user_turns"] = _filled(turns, np.zeros_like(alone))
    batch["position_ids"] = _positions(tries, places, rope, batch)
    return batch


def run_tries(model: Any, batch: Mapping[str, torch.Tensor], rules: MaskRules) -> Any:
    """Returns the model's output for a batch of tries, on its device.

    Args:
        model: Bare, with adapters, or with a soft prompt.
        batch: As ``trie_batch`` makes it.
        rules: Of its attention.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in LAYOUT}
    count = virtual_tokens(model)
    first = count if is_prefix(model) else 0
    masks = {kind: in_form(_seen(batch, window, count), rules)[:, :, first:] for kind, window in rules.windows.items()}
    inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    return run_behind_virtual_tokens(model, inputs) if count else model(**inputs, use_cache=False)


def _seen(batch: Mapping[str, torch.Tensor], window: int | None, virtual: int) -> torch.Tensor:
    """Returns the ``(B, 1, V + T, V + T)`` bool mask, True where a token is seen."""
    ends, places, images, hidden = (batch[name] for name in ("ends", "places", "images", "hidden"))
    if virtual:
        rows, length = ends.shape
        first = torch.arange(virtual, device=ends.device).expand(rows, -1)
        ends = torch.cat((torch.full_like(first, virtual + length), ends + virtual), dim=1)
        places = torch.cat((first, places + virtual), dim=1)
        images = torch.cat((torch.full_like(first, -1), images), dim=1)
        hidden = torch.nn.functional.pad(hidden, (virtual, 0))
    at = torch.arange(ends.shape[1], device=ends.device)
    seen = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < ends[:, None, :])
    if bool((images >= 0).any()):
        seen = seen | ((images[:, None, :] == images[:, :, None]) & (images[:, None, :] >= 0))
    if window is not None:
        seen = seen & (places[:, None, :] > places[:, :, None] - window)
    apart = hidden[:, None, :] | hidden[:, :, None]
    seen = (seen & ~apart) | torch.eye(at.numel(), dtype=torch.bool, device=at.device)
    return seen[:, None]


def _filled(values: Sequence[np.ndarray], empty: np.ndarray) -> torch.Tensor:
    out = empty.astype(np.int64)
    for row, own in enumerate(values):
        out[row, : own.size] = own
    return torch.from_numpy(out)


def _asking(trie: Trie) -> np.ndarray:
    asks = np.zeros(trie.input_ids.size, dtype=np.int64)
    asks[trie.asks] = 1
    return asks


def _along_paths(trie: Trie, turns_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns ``(T,)`` what ``turns_of`` says of every token along the paths of its rows."""
    turns = np.zeros(trie.input_ids.size, dtype=np.int64)
    for path in trie.paths():
        turns[path] = turns_of(trie.input_ids[path])
    return turns


def _runs(types_BT: torch.Tensor, tries: Sequence[Trie]) -> torch.Tensor:
    """Returns ``(B, T)`` a number for each run of image tokens, -1 elsewhere."""
    image = types_BT.numpy() == 1
    for row, trie in enumerate(tries):
        image[row, trie.input_ids.size :] = False
    starts = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    return torch.from_numpy(np.where(image, np.cumsum(starts, axis=1) - 1, -1))


def _conversations(trie: Trie) -> Iterator[EncodedRow]:
    """Yields the media of conversations that share any, every medium once.

    Some families cut an image that is alone in its conversation into tiles, so the media of rows
    that share none are kept apart.
    """
    labels = np.full_like(trie.input_ids, IGNORED)
    group: list[MediaSpan] = []
    spans = sorted(trie.media, key=lambda span: span.start)
    for at, (path, (start, end)) in enumerate(zip(trie.paths(), pairwise(trie.starts), strict=True)):
        before = path[: trie.shared[at]]
        if group and not np.isin([span.start for span in group], before).any():
            yield EncodedRow(trie.input_ids, labels, tuple(group))
            group = []
        group += [span for span in spans if start <= span.start < end]
    if group:
        yield EncodedRow(trie.input_ids, labels, tuple(group))


def _positions(
    tries: Sequence[Trie], places_BT: torch.Tensor, rope: RopeIndex | None, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    types_BT = batch.pop("mm_token_type_ids", None)
    grids = batch.get("image_grid_thw")
    if rope is None or grids is None:
        return places_BT.clone()
    masks = batch.get("feature_attention_mask")
    sounds = None if masks is None else masks.sum(-1)
    positions = places_BT.repeat(3, 1, 1)
    images = heard = 0
    for row, trie in enumerate(tries):
        audio = np.array([span.medium.modality == "audio" for span in trie.media], dtype=bool)
        number = np.where(audio, heard + np.cumsum(audio) - 1, images + np.cumsum(~audio) - 1)
        images, heard = images + int((~audio).sum()), heard + int(audio.sum())
        facts = _Facts(rope, None if types_BT is None else types_BT[row], grids, sounds, audio, number)
        positions[:, row, : trie.input_ids.size] = facts.positions(trie)
    return positions


class _Facts:
    """What the family's positions of one trie depend on.

    Args:
        rope: The family's positions.
        types: ``(T,)`` token types, where the family has them.
        grids: ``(N, 3)`` of all images of the batch.
        sounds: ``(M,)`` lengths of all sounds of the batch.
        audio: Per medium of the trie: whether it is a sound.
        number: Per medium of the trie: its number among the batch's images or sounds.
    """

    def __init__(
        self,
        rope: RopeIndex,
        types: torch.Tensor | None,
        grids: torch.Tensor,
        sounds: torch.Tensor | None,
        audio: np.ndarray,
        number: np.ndarray,
    ) -> None:
        self._rope, self._types, self._grids, self._sounds = rope, types, grids, sounds
        self._audio, self._number = audio, number

    def positions(self, trie: Trie) -> torch.Tensor:
        """Returns the ``(3, T)`` positions of a trie: on every path those of its row.

        The family is asked for rows that add a medium; any other text counts on from the highest position before it.
        """
        ids = torch.from_numpy(trie.input_ids.astype(np.int64))
        found = torch.zeros(3, ids.numel(), dtype=torch.int64)
        homes = np.array([span.start for span in trie.media], dtype=np.int64)
        for at, path in enumerate(trie.paths()):
            before, own = path[: trie.shared[at]], path[trie.shared[at] :]
            if not np.isin(homes, own).any():
                start = int(found[:, before].max()) + 1 if before.size else 0
                found[:, own] = start + torch.arange(own.size)
                continue
            made = self._ask(ids, path, np.isin(homes, path))
            found[:, own] = made[:, before.size :]
        return found

    def _ask(self, ids: torch.Tensor, path: np.ndarray, on_path: np.ndarray) -> torch.Tensor:
        pictures, sounds = on_path & ~self._audio, on_path & self._audio
        facts: dict[str, torch.Tensor] = {}
        if self._types is not None:
            facts["mm_token_type_ids"] = self._types[None, path]
        if pictures.any():
            facts["image_grid_thw"] = self._grids[self._number[pictures]]
        if self._sounds is not None:
            facts["audio_seqlens"] = self._sounds[self._number[sounds]]
        return self._rope(ids[path], facts)
