"""Tries to one batch of tensors and to the mask under which every row sees its own path alone.

Shapes: B tries, T tokens, V virtual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.paths import along_paths, image_runs, rope_positions, sharing_conversations
from mmtune.encoding.render import IGNORED, EncodedRow
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
    shown = packed if collate.media_by_row else [own for trie in tries for own in sharing_conversations(trie)]
    batch |= collate.media(shown)
    types, token_types = batch.pop("token_type_ids", None), batch.pop("mm_token_type_ids", None)
    alone = np.broadcast_to(np.arange(length), (len(tries), length))
    places = _filled([trie.places for trie in tries], np.zeros_like(alone))
    batch |= {
        "ends": _filled([trie.ends for trie in tries], alone + 1),
        "places": places,
        "images": torch.full_like(places, -1) if types is None else torch.from_numpy(image_runs(types.numpy())),
        "hidden": hidden,
        "asks": _filled([_asking(trie) for trie in tries], np.zeros_like(alone)).bool(),
    }
    if "prompt_mask" in batch:
        batch["prompt_mask"] = _filled([trie.prompt for trie in tries], np.zeros_like(alone))
    rows, turns_of = [[trie] for trie in tries], collate.user_turns
    if turns_of is not None:
        batch["user_turns"] = along_paths(rows, length, lambda trie, path: turns_of(trie.input_ids[path]))
    batch["position_ids"] = rope_positions(rows, places, rope, token_types, batch)
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
