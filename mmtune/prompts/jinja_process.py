"""Jinja templates rendered in a process of their own, which time and memory limits can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.prompts.forms import Filled, Template
from mmtune.records import Reject

_PACKAGES = Path(__file__).resolve().parents[2]


class JinjaProcess:
    """Renders ``jinja`` templates; the process starts with the first and ends with this object."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, template: Template, values: Mapping[str, Any], salt: str) -> Filled | Reject:
        """Returns a template filled, or why the row has not what it names (``missing_field``, ``template_failed``).

        Args:
            template: Of form ``jinja``.
            values: Name to what the data say; what JSON cannot hold is left out.
            salt: Equal salts draw alike.

        Raises:
            DataError: The template is no Jinja (``template_syntax``), or reaches for what it must
                not, loops for ever or makes too much (``template_refused``).
        """
        kept = {name: value for name, value in values.items() if _is_plain(value)}
        asked = {"source": template.prompt, "choices": template.choices, "values": kept, "salt": salt}
        said = self._ask(json.dumps(asked), template)
        if "error" not in said:
            answers = tuple(text for text in said["answers"] if text)
            return Filled(said["prompt"], next(iter(answers), ""), answers, tuple(said["options"]))
        if said["error"] in ("template_refused", "template_syntax"):
            raise DataError(
                f"the template {template.id!r} is refused: {said['detail']}", "mend or remove it", said["error"]
            )
        return Reject("", "", said["error"], f"template {template.id!r}: {said['detail']}")

    def _ask(self, line: str, template: Template) -> dict[str, Any]:
        child = self._child = self._child or _start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            back = child.stdout.readline()
        except BrokenPipeError:
            back = ""
        if back:
            said: dict[str, Any] = json.loads(back)
            return said
        self.close()
        slow = child.returncode == -signal.SIGALRM
        return {"error": "template_refused", "detail": "it takes too long" if slow else "its process died"}

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def __del__(self) -> None:
        self.close()


def _start() -> subprocess.Popen[str]:
    path = os.pathsep.join(part for part in (str(_PACKAGES), os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "mmtune.prompts.jinja_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
    )


def _is_plain(value: Any) -> bool:
    """Says whether JSON can hold a value."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, str | int | float)
