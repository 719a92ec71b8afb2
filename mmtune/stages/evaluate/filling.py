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

    Where codes were learned from some sources alone, the rows of those are filled in.

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
    from mmtune.training.filling import measure_filling, rows_to_fill

    model = load()
    learner = load_heads(model, base).to(model.device)
    own, codes = rows.for_model(model), learner.settings.codes
    chosen = rows_to_fill(codes.sources, [own.whole(row).source for row in range(len(own.kept))])
    batches = _batches(codes.parts, model, processor, own, chosen, asking)
    return [asdict(found) for found in measure_filling(learner, batches)]


def _batches(
    parts: tuple[str, ...], model: Any, processor: Any, rows: EvalRows, chosen: list[int], asking: Asking
) -> Iterator[Keyed]:
    from mmtune.evaluation.generation import Stopped
    from mmtune.training.paired import part_key

    collate, count = asking.collator(processor), len(chosen)
    with asking.progress(count, "eval fill in") as bar:
        for start in range(0, count, asking.batch_rows):
            if asking.should_stop():
                raise Stopped
            numbers = chosen[start : start + asking.batch_rows]
            encoded = rows.conversations(numbers)
            batch = {name: value.to(model.device) for name, value in collate(encoded).items()}
            keyed = [(row, number) for row, number in zip(encoded, numbers, strict=True)]
            yield batch, {part: [part_key(row, part, number) for row, number in keyed] for part in parts}
            bar.advance(len(numbers))
