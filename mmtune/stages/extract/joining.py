"""extract.joint at work: one vector per row out of the features of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.features.joint import JOINT, joined, joint_table
from mmtune.features.table import open_features
from mmtune.features.units import FeatureKind, JointRow
from mmtune.stages.extract.reducing import Reducer
from mmtune.storage import SplitWriter, finish_split


@dataclass(frozen=True)
class JoinedFacts:
    """What became of the rows.

    Attributes:
        rows: Those with a joint vector.
        reduced: What their reduction is; None without one.
    """

    rows: int
    reduced: dict[str, Any] | None


def join(rows: Sequence[JointRow], kinds: Sequence[FeatureKind], folder: Path, reducer: Reducer | None) -> JoinedFacts:
    """Writes the joint features of rows beside those of their kinds.

    Args:
        rows: What they show together.
        kinds: What is joined, in this order.
        folder: The features folder, which has the kinds.
        reducer: Makes one code of what a row shows, or None.

    Raises:
        DataError: Nothing of a kind has features.
    """
    for kind in kinds:
        if not (folder / kind).is_dir():
            raise DataError(
                f"extract.joint asks for {kind}, and nothing of it has features",
                "mend the data, or leave it out of extract.joint",
                "no_rows",
            )
    joint = joined(rows, {kind: open_features(folder, kind) for kind in kinds})
    made = None
    if reducer is not None:
        made = reducer.reduce(JOINT, joint.vectors, joint.present, [row.splits for row in joint.rows])
    table = joint_table(joint, None if made is None else made.codes)
    writer = SplitWriter(folder / JOINT / "shard-00000.arrow", table.schema)
    for batch in table.to_batches(max_chunksize=1000):
        writer.write_batch(batch)
    writer.close()
    finish_split(folder / JOINT, table.schema)
    return JoinedFacts(len(joint.rows), None if made is None else made.facts)
