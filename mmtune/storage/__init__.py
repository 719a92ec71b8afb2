"""What stages keep on disk: folders that are complete or absent, their splits and their rejects."""

from mmtune.storage.manifest import (
    Manifest,
    changes,
    is_finished,
    is_made,
    library_versions,
    read_manifest,
    stage_hash,
    verify_files,
)
from mmtune.storage.rejects import RejectLog
from mmtune.storage.splits import SplitWriter, finish_split, open_split
from mmtune.storage.stages import Staging, foresee, open_stage, verify_parents

__all__ = [
    "Manifest",
    "RejectLog",
    "SplitWriter",
    "Staging",
    "changes",
    "finish_split",
    "foresee",
    "is_finished",
    "is_made",
    "library_versions",
    "open_split",
    "open_stage",
    "read_manifest",
    "stage_hash",
    "verify_files",
    "verify_parents",
]
