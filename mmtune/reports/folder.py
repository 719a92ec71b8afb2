"""The files of report/ that a person opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.files import write_json
from mmtune.reports.markdown import write_markdown
from mmtune.reports.page import write_page
from mmtune.reports.samples import Sample


def write_report(folder: Path, report: Mapping[str, Any], samples: Sequence[Sample], log: Path | None) -> None:
    """Writes ``metrics.json``, ``report.md`` and ``index.html``.

    Args:
        folder: Where to.
        report: The report document.
        samples: Rows that the page shows.
        log: ``metrics.jsonl`` of the training behind the tuned model, if there was one.
    """
    lines = log.read_text("utf-8").splitlines() if log is not None and log.is_file() else []
    losses = [json.loads(line) for line in lines if line.strip()]
    write_json(folder / "metrics.json", report)
    (folder / "report.md").write_text(write_markdown(report), "utf-8")
    (folder / "index.html").write_text(write_page(report, samples, losses), "utf-8", errors="backslashreplace")
