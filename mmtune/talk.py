"""What a command says while it works: everything goes to stderr, progress only as fits the place.

Rich is imported where it draws: ``--help`` and ``--json`` do without most of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LOG_COLUMNS = 160
_WIDE, _BAR_COLUMNS = 120, 16
"""A terminal of fewer columns gets the short bar, of so many; any other one twice as many."""


def plain_colours() -> bool:
    """Says whether colours must stay off (``NO_COLOR`` wins over everything)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def stderr_console() -> Console:
    """Returns a console on stderr that honours ``NO_COLOR``; in a log file tables are not folded at 80 columns."""
    from rich.console import Console

    plain = plain_colours()
    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else _LOG_COLUMNS
    return Console(file=sys.stderr, no_color=plain or None, highlight=False, soft_wrap=True, width=width)


# A number, an interval, or a number with its interval behind it, as reports write them.
_NUMBERS = re.compile(r"(?:< )?[+−-]?\d[\d,.]*(?: ?%)?(?:(?: \[| to )[+−-]?[\d,.]+(?: to [+−-]?[\d,.]+)?\]?)?")


class Counter:
    """Progress of one loop; ``advance`` is all a stage calls."""

    def __init__(self, advance: Any) -> None:
        self._advance = advance

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts ``n`` more, with an optional short note such as ``loss=1.9``."""
        self._advance(n, note)


class Talk:
    """The voice of one command.

    Args:
        quiet: Say only warnings.
        every_seconds: How often a plain progress line is printed without a terminal.
    """

    def __init__(self, quiet: bool = False, every_seconds: float = 5.0) -> None:
        self.console = stderr_console()
        self.quiet = quiet
        self._every = every_seconds
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Prints one line of news."""
        self.lines.append(line)
        if not self.quiet:
            self.console.print(line, markup=False)

    def note(self, line: str) -> None:
        """Prints a warning: something worked in another way than one may expect."""
        self.lines.append(line)
        self.console.print(f"note: {line}", style="yellow", markup=False)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints a table; a column of numbers, or of intervals, is set right."""
        if self.quiet:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for column, name in enumerate(head):
            cells = [str(row[column]) for row in rows if row[column] != ""]
            number = bool(cells) and all(map(_NUMBERS.fullmatch, cells))
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, total: int | None, label: str, *, done: int = 0) -> Iterator[Counter]:
        """Shows a bar on a terminal, a line every few seconds elsewhere, also where a terminal cannot redraw a line.

        Args:
            total: How many there are.
            label: What they are.
            done: How many an earlier run did; the rate and the time left are of this run's own.
        """
        if self.quiet:
            yield Counter(lambda n, note: None)
        elif self.console.is_terminal and not self.console.is_dumb_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            bar_columns = _BAR_COLUMNS if self.console.width < _WIDE else 2 * _BAR_COLUMNS
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_columns),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=total, completed=done, note="", rate="")
                started, told = time.monotonic(), ""

                def advance(n: int, note: str) -> None:
                    nonlocal told
                    # A loop tells something now and then; what it told last stays until there is news.
                    told = note or told
                    now = bar.tasks[0].completed + n
                    rate = f"{(now - done) / max(time.monotonic() - started, 1e-6):.1f}/s"
                    counts = f"{total or '?'}" * 2
                    room = self.console.width - len(f"{label} {counts}/ {rate} 0:00:00 ") - bar_columns - 1
                    bar.update(task, advance=n, rate=rate, note=fitting(told, room))

                yield Counter(advance)
        else:
            plain = _PlainProgress(self.console, total, label, self._every, done)
            yield Counter(plain.advance)
            plain.end()


class _PlainProgress:
    """Progress as plain lines: ``finetune 120/2000 rate=8.1/s eta=00:03:52 loss=1.91``."""

    def __init__(self, console: Console, total: int | None, label: str, every_seconds: float, done: int) -> None:
        self._console, self._total, self._label, self._every = console, total, label, every_seconds
        self._started = self._last = time.monotonic()
        self._done = self._said = self._before = done
        self._note = ""

    def advance(self, n: int, note: str) -> None:
        self._done += n
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._print(now)

    def end(self) -> None:
        # A loop that was over at once says nothing; one whose last line told the end does not repeat it.
        if self._last != self._started and self._said != self._done:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._said = self._done
        rate = (self._done - self._before) / max(now - self._started, 1e-6)
        line = f"{self._label} {self._done}{f'/{self._total}' if self._total else ''} rate={rate:.1f}/s"
        if self._total and rate:
            left = int((self._total - self._done) / rate)
            line += f" eta={left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"
        self._console.print(f"{line} {self._note}".rstrip(), markup=False)


def fitting(note: str, room: int) -> str:
    """Returns as many words of a note, from its first, as go into so many columns."""
    words = note.split()
    while words and len(" ".join(words)) > room:
        words.pop()
    return " ".join(words)


def counted(count: int, noun: str) -> str:
    """Returns a number of things in words: ``1 row``, ``2 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def json_line(value: Any) -> str:
    """Returns the one JSON document of ``--json``, readable by people and programs, in letters that stdout takes."""
    ascii_only = not (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    # JSON has no NaN and no infinity.
    return json.dumps(_finite(value), ensure_ascii=ascii_only, indent=1, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Returns a value in which null stands for numbers that are none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
