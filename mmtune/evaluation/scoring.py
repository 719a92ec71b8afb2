"""Log-probabilities of the labels of rows, with every beginning that rows share run once.

Rows that begin alike are merged to tries (``encoding.trie``): the options of a question, the questions of a medium,
rows under one long instruction. Whether a model gives tries what it gives rows is checked on real ones; where
it does not, rows are run one by one and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import EncodedRow
from mmtune.encoding.trie import Trie, build_tries
from mmtune.errors import CapabilityError
from mmtune.evaluation.generation import Stopped, answer_losses, to_model
from mmtune.evaluation.trie_batch import run_tries, trie_batch
from mmtune.models.attention import attention_by, text_attention
from mmtune.models.label_tokens import only_label_tokens
from mmtune.models.mask_rules import MaskRules, mask_rules
from mmtune.models.rope_index import rope_index

_WINDOW = 1024
"""So many rows are encoded at a time."""
_LONGEST = 4096
"""Most tokens of a trie of short rows: its mask takes their square."""
_LOGITS = 1 << 24
"""Most logits that stand in fp32 at once (64 MiB)."""
_TOLERANCE = 1e-4
# Coarser types are measured against themselves: what the rows differ by under another attention kernel and when they
# are padded together, several times over.
_TIMES_NOISE = 4.0
_COMPARED, _COMPARED_COARSE = 3, 8
"""Rows of a trie that are also run alone."""

Scores = tuple[np.ndarray, np.ndarray]
"""``(N,)`` log-probability of every row's labels, and ``(N,)`` how many labels they are."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What scoring has cost so far.

    Attributes:
        rows: Rows scored: one per question and answer.
        passes: Forward passes of the model, those of the check included.
        tokens: Tokens that ran, without padding.
        apart: Tokens of the same rows, each run on its own.
    """

    rows: int = 0
    passes: int = 0
    tokens: int = 0
    apart: int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class RowScorer:
    """Scores rows under one model.

    Args:
        model: A transformers or PEFT model, in evaluation mode.
        collate: Rows and their media to a batch padded on the right.
        batch_rows: A batch holds about as many tokens as so many rows.
        should_stop: Asked before every batch; true ends it with ``generation.Stopped``.
        note: Told once why rows are not shared, where they are not.

    Attributes:
        calls: What scoring has cost so far.
    """

    def __init__(
        self,
        model: Any,
        collate: Collator,
        *,
        batch_rows: int = 16,
        should_stop: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model, self._collate, self._batch_rows = model, collate, batch_rows
        self._should_stop, self._note = should_stop, note
        self._width = int(model.config.get_text_config().hidden_size)
        self._rope = rope_index(model)
        # By the modalities of a trie: whether it is exact.
        self._exact: dict[frozenset[str], bool] = {}
        self._said: set[str] = set()
        self.calls = Calls()
        self._rules: MaskRules | None = None
        self._refused = ""
        try:
            self._rules = mask_rules(model)
        except CapabilityError as error:
            self._refused = str(error)

    def __call__(
        self,
        rows: Callable[[Sequence[int]], list[EncodedRow]],
        order: Sequence[int],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Scores:
        """Returns the scores of the rows that ``order`` numbers from 0 on.

        Args:
            rows: Row numbers to encoded rows with labels.
            order: Every number once; rows that begin alike should be near each other.
            advance: Told how many rows are done.

        Raises:
            Stopped: ``should_stop`` returned True.
            IntegrityError: A medium now takes another number of tokens than when it was encoded.
        """
        logprob, tokens = np.zeros(len(order)), np.zeros(len(order))
        for start in range(0, len(order), _WINDOW):
            numbers = list(order[start : start + _WINDOW])
            logprob[numbers], tokens[numbers] = self._window(rows(numbers), advance)
        return logprob, tokens

    def _window(self, rows: Sequence[EncodedRow], advance: Callable[[int], None]) -> Scores:
        logprob = np.zeros(len(rows))
        sizes = np.array([row.input_ids.size for row in rows])
        self.calls += Calls(rows=len(rows), apart=int(sizes.sum()))
        tries = self._tries(rows, sizes)
        self._check(rows, tries)
        tries = [trie for trie in tries if self._exact[_kinds(trie)]]
        for batch in self._batches(tries, self._batch_rows * int(sizes.max(initial=1))):
            if self._should_stop():
                raise Stopped
            for trie, found in zip(batch, self._run(batch), strict=True):
                np.add.at(logprob, trie.owners, found)
            advance(sum(trie.rows.size for trie in batch))
        shared = np.concatenate([trie.rows for trie in tries]) if tries else np.empty(0, dtype=np.int64)
        alone = np.setdiff1d(np.arange(len(rows)), shared)
        if alone.size:
            logprob[alone] = self._apart([rows[at] for at in alone], self._batch_rows, advance)
        return logprob, np.array([int((row.labels[1:] >= 0).sum()) for row in rows])

    def _tries(self, rows: Sequence[EncodedRow], sizes: np.ndarray) -> list[Trie]:
        """Returns the tries that share something."""
        if self._rules is None:
            self._say(self._refused)
            return []
        longest = int(sizes.max(initial=1))
        limit = max(longest, min(_LONGEST, self._batch_rows * longest))

        def joins(total: int, own: int, shared: int) -> bool:
            together = total + own - shared
            # A pair of tokens in attention takes 4 H operations of a layer, a token elsewhere about 24 H squared.
            pairs = together**2 - total**2 - own**2
            return together <= limit and shared > pairs / (6 * self._width)

        found = build_tries(rows, joins, whole_prompts=self._collate.reads_prompt)
        return [trie for trie in found if trie.rows.size > 1]

    @staticmethod
    def _batches(tries: Sequence[Trie], tokens: int) -> Iterator[list[Trie]]:
        """Yields tries of similar size, the longest first, padded to no more than so many tokens where one fits."""
        batch: list[Trie] = []
        for trie in sorted(tries, key=lambda trie: -trie.input_ids.size):
            if batch and (len(batch) + 1) * batch[0].input_ids.size > tokens:
                yield batch
                batch = []
            batch.append(trie)
        if batch:
            yield batch

    def _run(self, tries: Sequence[Trie]) -> list[np.ndarray]:
        """Returns per trie the ``(N,)`` log-probability of each of its labels."""
        assert self._rules is not None
        batch = to_model(trie_batch(tries, self._collate, self._rope), self._model)
        asks_BT = batch["asks"]
        with torch.inference_mode(), only_label_tokens(self._model, asks_BT):
            logits_NV = run_tries(self._model, batch, self._rules).logits[0]
        self.calls += Calls(passes=1, tokens=sum(trie.input_ids.size for trie in tries))
        size = max(_LOGITS // logits_NV.shape[-1], 1)
        total_N = torch.cat([torch.logsumexp(part.float(), -1) for part in logits_NV.split(size)])
        numbers_BT = torch.cumsum(asks_BT.flatten(), 0).view(asks_BT.shape) - 1
        out = []
        for row, trie in enumerate(tries):
            which = numbers_BT[row, torch.from_numpy(trie.asks).to(asks_BT.device)]
            targets = torch.from_numpy(trie.targets.astype(np.int64)).to(asks_BT.device)
            out.append((logits_NV[which, targets].float() - total_N[which]).double().cpu().numpy())
        return out

    def _apart(
        self, rows: Sequence[EncodedRow], batch_rows: int, advance: Callable[[int], None] = lambda n: None
    ) -> np.ndarray:
        """Returns the log-probabilities of rows, each run whole."""
        sizes = [row.input_ids.size for row in rows]
        nll, _ = answer_losses(
            self._model,
            lambda chosen: [rows[at] for at in chosen],
            self._collate,
            sizes=sizes,
            batch_rows=batch_rows,
            advance=advance,
            should_stop=self._should_stop,
        )
        self.calls += Calls(passes=-(-len(rows) // batch_rows), tokens=sum(sizes))
        return -nll

    def _check(self, rows: Sequence[EncodedRow], tries: Sequence[Trie]) -> None:
        """Compares, of every new set of modalities, the trie of most rows and that of most media with rows alone."""
        for kinds in {_kinds(trie) for trie in tries} - self._exact.keys():
            own = [trie for trie in tries if _kinds(trie) == kinds]
            most = (max(own, key=lambda trie: trie.rows.size), max(own, key=lambda trie: len(trie.media)))
            reason = ""
            for trie in most[: 1 if most[0] is most[1] else 2]:
                reason = reason or self._differs(rows, trie)
            self._exact[kinds] = not reason
            if reason:
                self._say(reason)

    def _differs(self, rows: Sequence[EncodedRow], trie: Trie) -> str:
        """Says why a trie may not stand for its rows, or nothing."""
        coarse = self._model.dtype != torch.float32
        count = min(_COMPARED_COARSE if coarse else _COMPARED, trie.rows.size)
        chosen = trie.rows[np.linspace(0, trie.rows.size - 1, count).astype(int)]
        try:
            labels = self._run([trie])[0]
        except CapabilityError as error:
            return str(error)
        except torch.OutOfMemoryError:
            return "not enough memory to compare shared rows with rows alone"
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            # A model that does not take a prepared mask may fail in any of these ways.
            first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            return f"the model refuses them ({first})"
        found = np.array([labels[trie.owners == number].sum() for number in chosen])
        alone = self._apart([rows[number] for number in chosen], 1)
        off = _off(found, alone)
        allowed = _TOLERANCE
        if off > allowed and coarse:
            allowed = max(allowed, _TIMES_NOISE * self._noise([rows[number] for number in chosen], alone))
        return "" if off <= allowed else f"log-probabilities differ by {off:.1e} of 1"

    def _noise(self, rows: Sequence[EncodedRow], alone: np.ndarray) -> float:
        """Returns what rows differ by where mathematics says that they are the same."""
        together = self._apart(rows, len(rows))
        with attention_by(self._model, "sdpa" if text_attention(self._model) == "eager" else "eager"):
            other = self._apart(rows, 1)
        return max(_off(together, alone), _off(other, alone))

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self._note(f"rows that begin alike are scored one by one: {reason}")


def _off(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference, of 1 or of the largest value."""
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def _kinds(trie: Trie) -> frozenset[str]:
    return frozenset(span.medium.modality for span in trie.media)
