"""Renders Jinja templates of strangers: run as a process of its own by ``jinja_process``.

It reads one JSON document a line and answers with one. The rules are PromptSource's
(``promptsource/templates.py`` in github.com/bigscience-workshop/promptsource): ``|||`` parts what
is asked from what is answered, ``answer_choices`` is rendered first, a ``|||`` inside the data
never parts anything, every part is stripped. What is not PromptSource's: the environment is
sandboxed, an unknown name is an error, ``choice`` draws by the row and not by chance, and ``{{ soft(8) }}`` in what is
asked puts eight learned vectors there.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment, SecurityError

from mmtune.records import SoftPart, marked, parts_of

SECONDS = 2
"""A template that renders longer than this ends the process."""
MOST_CHARACTERS = 1 << 20
"""A template that renders more than this is refused."""
_MOST_BYTES = 256 << 20
_BAR = "|||"
_INNER_BAR = "\0bar\0"
_MOST_SOFT = 999


class Refused(Exception):
    """A template that must not be rendered: reason and detail."""


class PromptEnvironment(SandboxedEnvironment):
    """PromptSource's environment in Jinja's sandbox, with its three filters and ``zip``.

    Attributes:
        draw: What the filter ``choice`` draws from.
    """

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined)
        self.draw = random.Random()
        self.globals.update(zip=zip, soft=soft)
        self.filters.update(choice=self._choice, most_frequent=most_frequent, highlight=str)
        self._compiled: dict[str, jinja2.Template] = {}

    # A filter that takes the context is not computed when a template is compiled: every row draws anew.
    @jinja2.pass_context
    def _choice(self, context: jinja2.runtime.Context, items: Iterable[Any]) -> Any:
        return self.draw.choice(list(items))

    def compiled(self, source: str) -> jinja2.Template:
        """Returns the template of a text, compiled once."""
        if source not in self._compiled:
            self._compiled[source] = self.from_string(source)
        return self._compiled[source]

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Returns an attribute; Python's inner names are refused also where there is none of that name."""
        _refuse_inner(attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Returns an item; Python's inner names are refused as in ``getattr``."""
        _refuse_inner(argument)
        return super().getitem(obj, argument)


def _refuse_inner(name: Any) -> None:
    if isinstance(name, str) and name.startswith("__"):
        raise SecurityError(f"access to {name!r} is unsafe")


def soft(tokens: int) -> str:
    """Returns the mark of so many soft tokens.

    Raises:
        Refused: It is no number from 1 to 999.
    """
    if not isinstance(tokens, int) or not 1 <= tokens <= _MOST_SOFT:
        raise Refused(f"soft({tokens!r}) is no number of soft tokens from 1 to {_MOST_SOFT}")
    return marked((SoftPart(tokens),))


def most_frequent(items: Sequence[Any]) -> list[Any]:
    """Returns the items that stand most often in a sequence, in the order of their first place."""
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]


def render(made: PromptEnvironment, source: str, choices: str, values: Mapping[str, Any], salt: str) -> dict[str, Any]:
    """Returns ``prompt``, ``answers`` and ``options`` of a template.

    Args:
        made: Renders it.
        source: Jinja text with ``|||``.
        choices: Jinja text of ``answer_choices``, or empty.
        values: Name to what the data say.
        salt: Equal salts draw the same ``choice``.

    Raises:
        Refused: The template reaches for what the sandbox forbids, renders too much, or answers with soft tokens.
        jinja2.TemplateError: It is no Jinja, or names what is not there.
    """
    made.draw.seed(salt)
    guarded = {
        name: value.replace(_BAR, _INNER_BAR) if isinstance(value, str) else value for name, value in values.items()
    }
    options: list[str] = []
    if choices:
        options = [_open(part).strip() for part in _text(made, choices, guarded).split(_BAR)]
    parts = _text(made, source, {**guarded, "answer_choices": options or None}).split(_BAR)
    prompt, *answers = [_open(part).strip() for part in parts]
    if any(isinstance(part, SoftPart) for text in (*answers, *options) for part in parts_of(text)):
        raise Refused("it has soft tokens in an answer: they are learned to be read, not to be said")
    return {"prompt": prompt, "answers": answers, "options": options}


def _text(made: PromptEnvironment, source: str, values: Mapping[str, Any]) -> str:
    parts, size = [], 0
    try:
        for part in made.compiled(source).generate(**values):
            size += len(part)
            if size > MOST_CHARACTERS:
                raise Refused(f"it renders more than {MOST_CHARACTERS:,} characters")
            parts.append(part)
    except SecurityError as error:
        raise Refused(str(error)) from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise Refused(f"it needs too much memory or depth ({type(error).__name__})") from error
    return "".join(parts)


def _open(text: str) -> str:
    return text.replace(_INNER_BAR, _BAR)


def answer(made: PromptEnvironment, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer to one request: what was rendered, or ``error`` and ``detail``."""
    try:
        return render(made, asked["source"], asked["choices"], asked["values"], asked["salt"])
    except Refused as refused:
        return {"error": "template_refused", "detail": str(refused)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "template_syntax", "detail": f"line {error.lineno}: {error.message}"}
    except jinja2.UndefinedError as error:
        return {"error": "missing_field", "detail": str(error)}
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, jinja2.TemplateError) as error:
        return {"error": "template_failed", "detail": f"{type(error).__name__}: {error}"}


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as handle:
        held = int(handle.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MOST_BYTES, held + _MOST_BYTES))


def serve(lines: Any, write: Callable[[str], object], flush: Callable[[], object]) -> None:
    """Answers every line until there are no more; SIGALRM ends the process when one takes too long."""
    made = PromptEnvironment()
    for line in lines:
        # The default action of the signal needs no Python to run: a loop inside C code ends too.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        out = json.dumps(answer(made, json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(out + "\n")
        flush()


def main() -> None:
    """Serves stdin to stdout."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        _limit_memory()
    serve(sys.stdin, sys.stdout.write, sys.stdout.flush)


if __name__ == "__main__":
    main()
