"""How well a pretrained base fills in a missing medium, on the rows that are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtune.evaluation.asking import Asking
    from mmtune.evaluation.rows import EvalRows
    from mmtune.training.filling import Keyed


def filling_of(
    load: Callable[[], Any], base: Path, processor: Any, rows: EvalRows, asking: Asking
) -> list[dict[str, Any]] | None:
    """Returns how well the generators beside a base fill in each medium, or None where there are none.

    Args:
        load: Loads the base.
        base: Its folder, or the hub id of a model that has no generators.
        processor: Its processor.
        rows: Already examined.
        asking: For the batches.

    Raises:
        Stopped: ``asking.should_stop`` said so.
    """
    from mmtune.training.heads import has_generators, load_heads

    if not has_generators(base):
        return None
    from mmtune.training.filling import measure_filling

    model = load()
    learner = load_heads(model, base).to(model.device)
    batches = _batches(learner.settings.codes.parts, model, processor, rows.for_model(model), asking)
    return [asdict(found) for found in measure_filling(learner, batches)]


def _batches(parts: tuple[str, ...], model: Any, processor: Any, rows: EvalRows, asking: Asking) -> Iterator[Keyed]:
    from mmtune.evaluation.generation import Stopped
    from mmtune.training.paired import part_key

    collate, count = asking.collator(processor), len(rows.kept)
    with asking.progress(count, "eval fill in") as bar:
        for start in range(0, count, asking.batch_rows):
            if asking.should_stop():
                raise Stopped
            numbers = range(start, min(start + asking.batch_rows, count))
            encoded = rows.conversations(numbers)
            batch = {name: value.to(model.device) for name, value in collate(encoded).items()}
            keyed = [(row, number) for row, number in zip(encoded, numbers, strict=True)]
            yield batch, {part: [part_key(row, part, number) for row, number in keyed] for part in parts}
            bar.advance(len(numbers))
