"""eval.answer: prototype and soft at work: which training rows stand for a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.choice import id_hash
from mmtune.errors import DataError
from mmtune.evaluation.rows import ChosenExamples, EvalRows, answer_of
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.shots import exchange
from mmtune.recipe import Eval
from mmtune.recipe.evaluation import BY_STATES
from mmtune.records import Example
from mmtune.stages.evaluate.plan import Plan, check_one_state, no_options
from mmtune.storage import open_split
from mmtune.talk import Talk

if TYPE_CHECKING:
    from mmtune.evaluation.prototypes import Label, SolvedRows

_NAMED = 5


def check_solved(run_dir: Path, settings: Eval) -> None:
    """Checks, before anything is trained, that the labels of the rows to ask have training rows.

    Raises:
        DataError: As ``solved_rows``.
    """
    if settings.answer not in BY_STATES or settings.limit is not None:
        return
    table = open_split(run_dir / "instructions" / settings.split)
    asked = zip(table.column("source").to_pylist(), table.column("options").to_pylist(), strict=True)
    wanted = dict.fromkeys((source, option) for source, options in asked for option in options or ())
    found = _found(run_dir / "instructions" / "train", wanted, 1)
    counts = Counter((example.source, answer_of(example)) for example in found)
    for source, own in _by_source(wanted, counts).items():
        _check_labels(settings.answer, source, own)


def solved_rows(plan: Plan, asked: EvalRows, make: Callable[..., EvalRows], console: Talk) -> SolvedRows:
    """Returns the training rows that a verbalizer is made of: of every label those whose ids hash lowest.

    They are shown as they are asked, without exemplars.

    Args:
        plan: What is evaluated.
        asked: The rows that are answered, examined.
        make: ``(count, example)`` to rows that are not examined yet.
        console: Told how many rows stand for a label.

    Raises:
        DataError: No row that is asked has options, or a source has no solved row with any of its options (for soft
            with one of them), or one option alone.
        RecipeError: See ``check_one_state``.
    """
    from mmtune.evaluation.prototypes import SolvedRows

    check_one_state(plan.settings, plan.model, plan.revision, offline=plan.offline)
    examples = [asked.example(row) for row in range(len(asked.kept))]
    wanted = dict.fromkeys((one.source, option) for one in examples for option in one.options)
    most = plan.settings.per_label
    if not wanted:
        raise no_options(plan.settings)
    soft = plan.settings.answer == "soft"
    found = _found(plan.recipe.run_dir / "instructions" / "train", wanted, most)
    rows = make(len(found), found.__getitem__)
    kept = [example for example in rows.examine() if example is not None]
    labels = tuple((example.source, answer_of(example)) for example in kept)
    counts = Counter(labels)
    for source, own in _by_source(wanted, counts).items():
        _check_labels(plan.settings.answer, source, own)
        listed = ", ".join(f"{option} {count}" for option, count in own.items())
        console.say(f"eval: {'vectors' if soft else 'prototypes'} of {source}: {listed}")
    return SolvedRows(rows, labels, soft)


def _by_source(wanted: dict[Label, None], counts: Mapping[Label, int]) -> dict[str, dict[str, int]]:
    """Returns the training rows of every option, by source."""
    found: dict[str, dict[str, int]] = {}
    for source, option in wanted:
        found.setdefault(source, {})[option] = counts.get((source, option), 0)
    return found


def _check_labels(answer: str, source: str, rows: Mapping[str, int]) -> None:
    """Raises DataError where too few labels have training rows.

    Args:
        answer: ``eval.answer``.
        source: That is asked.
        rows: Its options to their training rows.
    """
    bare = [option for option, count in rows.items() if not count]
    if len(bare) == len(rows) or (answer == "soft" and bare):
        what = "one of its options" if len(bare) == len(rows) else _some(bare)
        raise DataError(
            f"eval.answer {answer}: no training row of {source!r} answers with {what}",
            "add a source with `split: train` of the same id; or set eval.answer: rank",
            "no_prototypes",
        )
    if answer == "soft" and len(rows) < 2:
        raise DataError(
            f"eval.answer soft: every row of {source!r} has one option alone, {_some(list(rows))}",
            "name all labels as options; or set eval.answer: rank",
            "one_label",
        )


def _some(options: Sequence[str]) -> str:
    named = ", ".join(repr(option) for option in options[:_NAMED])
    return named if len(options) <= _NAMED else f"{named} and {len(options) - _NAMED:,} more"


def _found(folder: Path, wanted: dict[Label, None], most: int) -> list[Example]:
    if not folder.is_dir():
        return []
    table, left = open_split(folder), Counter(dict.fromkeys(wanted, most))
    read = ChosenExamples(table.to_batches(), row_to_example, None)
    ids = [str(name) for name in table.column("id").to_pylist()]
    sources = table.column("source").to_pylist()
    known, out = {source for source, _ in wanted}, []
    own = (at for at in range(len(ids)) if sources[at] in known)
    for at in sorted(own, key=lambda at: (id_hash(ids[at], "source"), at)):
        if not any(left.values()):
            break
        example = read(at)
        turns, label = exchange(example), (example.source, answer_of(example))
        if turns and left[label] > 0:
            left[label] -= 1
            head = tuple(message for message in example.messages[:1] if message.role == "system")
            out.append(replace(example, messages=(*head, *turns), exemplar_ids=()))
    return out
