"""What answers rest on: the same rows asked again with something taken away.

A modality goes (of a composite model nobody sees its tokens, as under modality dropout in training; any other model is
asked without the medium), a composite model answers by one branch alone, exemplars go, or questions change places.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from mmtune.evaluation.asking import Answering, Asking, Losses
from mmtune.evaluation.comparison import ScoredRow, compare, perplexities
from mmtune.evaluation.rows import EvalRows, question_of
from mmtune.models.composite.scores import branches_of, only_branch, sees_by_mask
from mmtune.records import MODALITIES, Example, Medium, Message, TextPart

KINDS = ("modality", "fusion", "shots", "instructions")
"""What can be taken away: a modality, all branches but one, exemplars, the right question."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What planning needs of a row.

    Attributes:
        modalities: Of its media.
        shots: Whether exemplars stand before its question.
        question: Text of its last user turn.
    """

    modalities: frozenset[str]
    shots: bool
    question: str


@dataclass(frozen=True, slots=True)
class Ablation:
    """One thing that is taken away from the rows that have it.

    Attributes:
        kind: One of ``KINDS``.
        name: As a report calls what is left.
        rows: Numbers of the kept rows that it changes.
        change: Row number and example to the example that is asked.
        missing: Modalities whose tokens nobody sees.
        branch: The branch that answers alone; empty for the model as it is.
    """

    kind: str
    name: str
    rows: tuple[int, ...]
    change: Callable[[int, Example], Example] = lambda row, example: example
    missing: tuple[str, ...] = ()
    branch: str = ""


@dataclass(frozen=True)
class Ablated:
    """The answers under an ablation.

    Attributes:
        rows: Numbers of the kept rows that were asked; what does not fit any more is left out.
        texts: Their answers.
        losses: ``(nll, tokens)`` of their reference answers, where they were asked for.
    """

    ablation: Ablation
    rows: tuple[int, ...]
    texts: list[str]
    losses: Losses | None


def row_facts(example: Example) -> RowFacts:
    """Returns what planning needs of an example."""
    modalities = frozenset(medium.modality for medium in example.media)
    return RowFacts(modalities, bool(example.exemplar_ids), question_of(example))


def idle_kinds(kinds: Sequence[str], facts: Sequence[RowFacts], branches: Sequence[str]) -> dict[str, str]:
    """Returns what cannot be taken away, and why.

    Args:
        kinds: Some of ``KINDS``.
        facts: Of every kept row.
        branches: What the model's gate mixes.
    """
    why = {
        "modality": "" if any(own.modalities for own in facts) else "no row has a medium",
        "fusion": "" if len(branches) > 1 else "the model has no passes, as those of late and hybrid fusion",
        "shots": "" if any(own.shots for own in facts) else "no row shows exemplars",
        "instructions": "" if len({own.question for own in facts}) > 1 else "all rows ask the same",
    }
    return {kind: why[kind] for kind in kinds if why[kind]}


def plan_ablations(
    kinds: Sequence[str], facts: Sequence[RowFacts], *, branches: Sequence[str], by_mask: bool, seed: int
) -> list[Ablation]:
    """Returns what is taken away, in the order of ``KINDS``; nothing that no row has.

    Args:
        kinds: Some of ``KINDS``.
        facts: Of every kept row.
        branches: What the model's gate mixes; fewer than two for a model without a gate.
        by_mask: A modality is hidden, and not left out of the conversation.
        seed: Of the order in which questions change places.
    """
    planned: list[Ablation] = []
    if "modality" in kinds:
        planned += _modalities(facts, by_mask)
    if "fusion" in kinds and len(branches) > 1:
        planned += _branches(facts, branches)
    if "shots" in kinds:
        rows = tuple(at for at, own in enumerate(facts) if own.shots)
        planned.append(Ablation("shots", "without exemplars", rows, lambda row, example: without_shots(example)))
    if "instructions" in kinds:
        other = changed_places([own.question for own in facts], seed)
        planned.append(
            Ablation(
                "instructions",
                "questions shuffled",
                tuple(other),
                lambda row, example: with_question(example, facts[other[row]].question),
            )
        )
    return [one for one in planned if one.rows]


def _modalities(facts: Sequence[RowFacts], by_mask: bool) -> Iterator[Ablation]:
    wanted: list[tuple[str, tuple[str, ...]]] = [(f"without {modality}", (modality,)) for modality in MODALITIES]
    if any(len(own.modalities) > 1 for own in facts):
        wanted.append(("without any medium", MODALITIES))
    for name, gone in wanted:
        rows = tuple(at for at, own in enumerate(facts) if own.modalities & set(gone))
        if by_mask:
            yield Ablation("modality", name, rows, missing=gone)
        else:
            yield Ablation("modality", name, rows, _leave_out(gone))


def _leave_out(gone: Sequence[str]) -> Callable[[int, Example], Example]:
    return lambda row, example: without_media(example, gone)


def _branches(facts: Sequence[RowFacts], branches: Sequence[str]) -> Iterator[Ablation]:
    for branch in branches:
        reads: dict[str, set[str]] = {"joint": set(MODALITIES), "image": {"image", "video"}}
        read = reads.get(branch, {branch})
        rows = tuple(at for at, own in enumerate(facts) if own.modalities & read)
        yield Ablation("fusion", f"{branch} pass alone", rows, branch=branch)


def without_media(example: Example, modalities: Sequence[str]) -> Example:
    """Returns the example without its media of some modalities."""

    def kept(message: Message) -> Message:
        gone = [isinstance(part, Medium) and part.modality in modalities for part in message.parts]
        return replace(message, parts=tuple(part for part, own in zip(message.parts, gone, strict=True) if not own))

    return replace(example, messages=tuple(kept(message) for message in example.messages))


def without_shots(example: Example) -> Example:
    """Returns the example without the solved rows before its question; a system turn stays."""
    last = max(at for at, message in enumerate(example.messages) if message.role == "user")
    opening = tuple(message for message in example.messages[:1] if message.role == "system")
    return replace(example, messages=(*opening, *example.messages[last:]), exemplar_ids=())


def with_question(example: Example, text: str) -> Example:
    """Returns the example with another text in its last user turn; its media stay where they stand."""
    last = max(at for at, message in enumerate(example.messages) if message.role == "user")
    asked = example.messages[last]
    places = [at for at, part in enumerate(asked.parts) if isinstance(part, TextPart)]
    first = places[0] if places else len(asked.parts)
    before = asked.parts[:first]
    after = tuple(part for part in asked.parts[first:] if not isinstance(part, TextPart))
    changed = replace(asked, parts=(*before, TextPart(text), *after))
    return replace(example, messages=(*example.messages[:last], changed, *example.messages[last + 1 :]))


def changed_places(texts: Sequence[str], seed: int) -> dict[int, int]:
    """Returns row to the row whose text it gets, never a text equal to its own; every text is given on once.

    Where one text makes up more than half of the rows, rows that would keep their text are left out.

    Args:
        texts: Of every row.
        seed: Of the order.
    """
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    counts = Counter(texts[row] for row in order)
    # Equal texts stand together, the most frequent first; a step as long as their run leaves each of them.
    ranks = {text: place for place, text in enumerate(sorted(counts, key=lambda text: -counts[text]))}
    order.sort(key=lambda row: ranks[texts[row]])
    step = max(counts.values(), default=0)
    given = {row: order[(place + step) % len(order)] for place, row in enumerate(order)}
    return {row: given[row] for row in sorted(given) if texts[given[row]] != texts[row]}


def ask_again(
    name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking, kinds: Sequence[str], seed: int
) -> list[Ablated]:
    """Returns a model's answers with one thing after the other taken away.

    Args:
        name: Of the model, for progress.
        model: Loaded.
        processor: Its processor.
        rows: Already examined.
        asking: How rows are asked.
        kinds: Some of ``KINDS``.
        seed: Of the order in which questions change places.

    Raises:
        Stopped: ``asking.should_stop`` said so.
    """
    facts = [row_facts(rows.example(at)) for at in range(len(rows.kept))]
    planned = plan_ablations(kinds, facts, branches=branches_of(model), by_mask=sees_by_mask(model), seed=seed)
    found = []
    for ablation in planned:
        label = f"{name} {ablation.name}"
        own = rows.changed(ablation.rows, ablation.change)
        with asking.progress(len(ablation.rows), f"eval {label} encode") as bar:
            for _ in own.examine():
                bar.advance(1)
        if not own.kept:
            continue
        asked = replace(asking, missing=ablation.missing)
        alone: AbstractContextManager[Any] = only_branch(model, ablation.branch) if ablation.branch else nullcontext()
        with alone:
            answering = Answering(model, processor, asked)
            texts = answering.answers(own, label)
            losses = answering.losses(own, label) if asking.loss else None
        found.append(Ablated(ablation, tuple(ablation.rows[at] for at in own.kept), texts, losses))
    return found


def ablation_report(
    rows: Sequence[ScoredRow],
    model: str,
    texts: Sequence[str],
    losses: Losses | None,
    found: Sequence[Ablated],
    kinds: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns what every ablation did to the scores of a model, each on the rows that it changes.

    The last entry is no model: it gives each source's commonest answer, which is what guessing reaches.

    Args:
        rows: The kept rows.
        model: Its name.
        texts: Its own answers.
        losses: Its own losses, or None.
        found: Its answers under ablations.
        kinds: What was asked to be taken away.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    sure = {"resamples": resamples, "seed": seed}
    entries = []
    for one in found:
        chosen = [rows[at] for at in one.rows]
        pair = {model: [texts[at] for at in one.rows], one.ablation.name: one.texts}
        entry = _entry(one.ablation.kind, one.ablation.name, chosen, pair, sure)
        if losses is not None and one.losses is not None:
            index = list(one.rows)
            both = {model: (losses[0][index], losses[1][index]), one.ablation.name: one.losses}
            entry["perplexity"] = perplexities(both, [row.group for row in chosen], **sure)
        entries.append(entry)
    guess = {model: list(texts), "guess": commonest_answers(rows)}
    entries.append(_entry("guess", "the commonest answer, always", rows, guess, sure))
    had = {one.ablation.kind for one in found}
    return {"model": model, "entries": entries, "nothing": [kind for kind in kinds if kind not in had]}


def _entry(
    kind: str, name: str, rows: Sequence[ScoredRow], texts: Mapping[str, Sequence[str]], sure: Mapping[str, int]
) -> dict[str, Any]:
    found = compare(rows, texts, resamples=sure["resamples"], seed=sure["seed"])
    return {"kind": kind, "name": name, "n": len(rows), "metrics": found.metrics}


def commonest_answers(rows: Sequence[ScoredRow]) -> list[str]:
    """Returns, for every row, the first reference that is most frequent in its source."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.source, Counter()).update(row.references[:1])
    common = {source: (found.most_common(1) or [("", 0)])[0][0] for source, found in counts.items()}
    return [common[row.source] for row in rows]
