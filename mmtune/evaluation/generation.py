"""Answers and answer losses of a model over encoded rows, in batches of similar length.

Rows are asked for by number and encoded when their batch comes, so memory does not grow with
their count. Shapes: B batch, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmtune.models.soft_prompt import is_prefix, virtual_tokens

Rows = Callable[[Sequence[int]], list[Any]]
"""Row numbers to encoded rows."""
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
"""Encoded rows to a padded batch with ``labels``."""
_LOGITS_BYTES = 1 << 30
"""Most bytes of fp32 logits held at once by the loss."""


class Stopped(Exception):
    """``should_stop`` said so; nothing was returned."""


def stop_ids(model: Any, tokenizer: Any, examples: Sequence[Any] = ()) -> list[int]:
    """Returns the ids that end an answer.

    Args:
        model: Its generation config names the family's own.
        tokenizer: Its end token ends an answer too.
        examples: Encoded conversations; a control token that closes a trained answer is what
            tuning teaches the model to stop with.
    """
    found: set[int | None] = set()
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found |= set(own) if isinstance(own, list | tuple) else {own}
    found.add(tokenizer.eos_token_id)
    known = getattr(tokenizer, "added_tokens_decoder", {})
    for row in examples:
        bears = np.flatnonzero(row.labels >= 0)
        if bears.size and (last := int(row.labels[bears[-1]])) in known:
            found.add(last)
    return sorted(int(value) for value in found if value is not None)


def batches(sizes: Sequence[int], batch_rows: int, *, equal: bool = False) -> Iterator[list[int]]:
    """Yields row numbers in batches of similar size, or of ``equal`` size, the longest first.

    The longest come first so that a model that does not fit fails at once.
    """
    lengths = np.asarray(sizes, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    for group in np.split(order, cuts) if equal else [order]:
        for start in range(0, len(group), batch_rows):
            yield [int(index) for index in group[start : start + batch_rows]]


def model_batches(
    model: Any,
    rows: Rows,
    collate: Collate,
    *,
    sizes: Sequence[int],
    batch_rows: int,
    advance: Callable[[int], None],
    should_stop: Callable[[], bool],
    equal: bool = False,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yields row numbers and their batch on the model's device, and counts a batch once the next one is asked for.

    With ``equal`` no batch has padding.

    Raises:
        Stopped: ``should_stop`` returned True.
    """
    for chosen in batches(sizes, batch_rows, equal=equal):
        if should_stop():
            raise Stopped
        yield chosen, to_model(collate(rows(chosen)), model)
        advance(len(chosen))


def generate_texts(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    collate: Collate,
    *,
    sizes: Sequence[int],
    stops: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_rows: int,
    advance: Callable[[int], None] = lambda n: None,
    should_stop: Callable[[], bool] = lambda: False,
    look: Callable[[np.ndarray], None] = lambda peaks: None,
) -> list[str]:
    """Returns the greedy answer to every row, in the rows' order.

    Args:
        model: A transformers or PEFT model that generates.
        tokenizer: Decodes the new tokens only, without control tokens.
        rows: Row numbers to encoded prompts.
        collate: Prompts to a batch padded on the left.
        sizes: Length of every prompt in tokens.
        stops: Ids that end an answer.
        pad_id: Fills answers that ended early.
        max_new_tokens: Longest answer.
        batch_rows: Prompts per batch.
        advance: Told how many rows are done.
        should_stop: Asked before every batch.
        look: Given the ``(B,)`` highest logit of every row at every step; NaN where one of its logits is.

    Raises:
        Stopped: ``should_stop`` returned True.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    def seen(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        look(logits_BV.amax(1).float().cpu().numpy())
        return logits_BV

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        # A family's default penalty would change what greedy means.
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad_id,
    )
    texts = [""] * len(sizes)
    made = model_batches(
        model,
        rows,
        collate,
        sizes=sizes,
        batch_rows=batch_rows,
        advance=advance,
        should_stop=should_stop,
        # Virtual tokens stand before the padding, and PEFT counts it: a short row would see them from further away.
        equal=bool(virtual_tokens(model)),
    )
    with warnings.catch_warnings():
        # transformers gives positions to every model, and PEFT says of each virtual prompt that it counts its own.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        for chosen, batch in made:
            batch.pop("labels", None)
            with torch.inference_mode():
                out_BT = model.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList([seen]))
            new_BT = out_BT[:, batch["input_ids"].shape[1] :].tolist()
            for index, ids in zip(chosen, new_BT, strict=True):
                texts[index] = _decode(tokenizer, ids, stops)
    return texts


def _decode(tokenizer: Any, ids: list[int], stops: Sequence[int]) -> str:
    end = next((at for at, value in enumerate(ids) if value in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def answer_losses(
    model: Any,
    rows: Rows,
    collate: Collate,
    *,
    sizes: Sequence[int],
    batch_rows: int,
    advance: Callable[[int], None] = lambda n: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the summed negative log likelihood of every row's answer, and its number of tokens.

    Args:
        model: A transformers or PEFT model.
        rows: Row numbers to encoded conversations with labels.
        collate: Conversations to a batch padded on the right, as in training.
        sizes: Length of every conversation in tokens.
        batch_rows: Conversations per batch.
        advance: Told how many rows are done.
        should_stop: Asked before every batch.

    Raises:
        Stopped: ``should_stop`` returned True.
    """
    nll, tokens = np.zeros(len(sizes)), np.zeros(len(sizes))
    keeps = takes_positions(model)
    for chosen, batch in model_batches(
        model, rows, collate, sizes=sizes, batch_rows=batch_rows, advance=advance, should_stop=should_stop
    ):
        with torch.inference_mode():
            sums_B, counts_B = _row_losses(model, batch, keeps)
        nll[chosen], tokens[chosen] = sums_B.double().cpu().numpy(), counts_B.cpu().numpy()
    return nll, tokens


def takes_positions(model: Any) -> bool:
    """Says whether the model can be asked for the logits of some positions only."""
    if virtual_tokens(model) and not is_prefix(model):
        # Places would count from the first virtual token, whose logits are cut off.
        return False
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    return "logits_to_keep" in inspect.signature(bare.forward).parameters


def _row_losses(model: Any, batch: dict[str, torch.Tensor], keeps: bool) -> tuple[torch.Tensor, torch.Tensor]:
    labels_BT = batch.pop("labels")
    # The logits at a position speak of the next token.
    targets_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=-100)
    kept_K = (targets_BT != -100).any(0).nonzero()[:, 0]
    if not kept_K.numel():
        zeros_B = torch.zeros(len(labels_BT))
        return zeros_B, zeros_B
    logits = model(**batch, use_cache=False, **({"logits_to_keep": kept_K} if keeps else {})).logits
    logits_BKV = logits if keeps else logits[:, kept_K]
    targets_BK = targets_BT[:, kept_K]
    sums_B = torch.zeros(len(labels_BT), dtype=torch.float64)
    step = max(1, _LOGITS_BYTES // (4 * logits_BKV.shape[1] * logits_BKV.shape[2]))
    for start in range(0, len(sums_B), step):
        part_BKV, wanted_BK = logits_BKV[start : start + step], targets_BK[start : start + step]
        loss_BK = functional.cross_entropy(part_BKV.float().transpose(1, 2), wanted_BK, reduction="none")
        sums_B[start : start + step] = loss_BK.double().sum(1).cpu()
    return sums_B, (targets_BK != -100).sum(1)


def to_model(batch: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Returns the batch on the model's device, pixels and samples in the model's type."""
    parameter = next(model.parameters())
    floating = getattr(model, "dtype", parameter.dtype)
    return {
        name: value.to(parameter.device, floating if value.is_floating_point() else None)
        for name, value in batch.items()
    }
