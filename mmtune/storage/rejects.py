"""The list of refused rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mmtune.records import Reject


class RejectLog:
    """Refused rows, one JSON line each, with a count by reason.

    Attributes:
        counts: Reason code to number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.counts: dict[str, int] = {}
        self._handle = open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def write(self, reject: Reject) -> None:
        """Adds one refused row."""
        self.counts[reject.reason] = self.counts.get(reject.reason, 0) + 1
        self._handle.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flushes the file."""
        self._handle.close()

    def __enter__(self) -> RejectLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
