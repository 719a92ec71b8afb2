"""The trace of a search: one JSON line per step, from which a broken run is replayed.

A search is a pure function of its seed and of what models said. The trace keeps what they said, so
a run that was killed walks the same path again without asking a model, and goes on behind it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mmtune.errors import IntegrityError


class Trace:
    """Lines of ``trace.jsonl``.

    Args:
        path: The file, or None to keep the lines in memory alone.
        identity: Of the search; the file of another one is started afresh.

    Attributes:
        lines: All lines after the first, replayed ones included.
        replayed: How many were there when the file was opened.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._handle: IO[str] | None = None
        start = {"kind": "start", **(identity or {})}
        self._waiting: list[dict[str, Any]] = []
        if path is not None:
            kept = _whole_lines(path)
            if kept and kept[0] == json.loads(json.dumps(start)):
                self._waiting = kept[1:]
            else:
                kept = [start]
            path.parent.mkdir(parents=True, exist_ok=True)
            # A torn last line is dropped: what it told was not used yet.
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(map(_line, kept)), "utf-8")
            fresh.replace(path)
            self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.replayed = len(self._waiting)

    def step(self, kind: str, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Returns what a step said: of the broken run while its lines last, then what ``make`` returns.

        Args:
            kind: Such as ``score`` or ``proposal``.
            key: What was asked; a replayed line must have the same.
            make: Asks the model; called only where no line is left.

        Raises:
            IntegrityError: The trace tells another path than this search takes.
        """
        at = len(self.lines)
        if at < self.replayed:
            line = self._waiting[at]
            if (line["kind"], line["key"]) != (kind, key):
                raise IntegrityError(
                    f"line {at + 2} of the trace is {line['kind']} {line['key']}, this search asks for {kind} {key}",
                    "the code or a library changed since the run was stopped; start anew with --resume never",
                    "other_trace",
                )
        else:
            line = {"kind": kind, "key": key, **make()}
            if self._handle is not None:
                self._handle.write(_line(line))
                self._handle.flush()
                os.fsync(self._handle.fileno())
        self.lines.append(line)
        return line

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a trace, the first (``start``) included."""
    return _whole_lines(path)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
