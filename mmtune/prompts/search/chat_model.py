"""One question to a chat model behind an OpenAI-compatible URL, with timeouts and bounded retries."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mmtune.errors import CapabilityError, RecipeError

_LONGEST_PAUSE = 30.0
_MOST_BYTES = 1 << 20
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: a key is for the server that the recipe names."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


_OPEN = urllib.request.build_opener(_NoRedirect).open


class _Busy(Exception):
    """Worth another try, after a pause of at least ``seconds``."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass(frozen=True)
class ChatModel:
    """Asks a chat model.

    Attributes:
        url: Base URL; ``/chat/completions`` is asked.
        model: Its name there.
        key: Sent as a bearer token; empty for none. Never shown.
        timeout_seconds: Longest wait for one answer.
        retries: More tries after a timeout, a 429 or a 5xx.
        temperature: Of its answers.
        sleep: Waits.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_seconds: float = 60.0
    retries: int = 4
    temperature: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                f"prompt.llm.url {self.url!r} is no http address", "such as http://localhost:8000/v1", "bad_url"
            )

    def __call__(self, question: str) -> str:
        """Returns the model's answer.

        Raises:
            CapabilityError: The server is not there, refuses, stays busy, or answers with something else.
        """
        pause = 1.0
        for left in range(self.retries, -1, -1):
            try:
                return self._ask(question)
            except _Busy as busy:
                if not left:
                    raise self._failed(f"stayed busy: {busy}, {self.retries + 1} tries") from busy
                self.sleep(min(max(pause, busy.seconds), _LONGEST_PAUSE))
                pause *= 2
        raise AssertionError("the last try returns or raises")

    def _ask(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with _OPEN(request, timeout=self.timeout_seconds) as answer:
                raw = answer.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = error.read(400).decode("utf-8", "replace")
            if error.code in _BUSY:
                raise _Busy(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After"))) from error
            raise self._failed(f"refused with HTTP {error.code}: {' '.join(said.split())}") from error
        except TimeoutError as error:
            raise _Busy(f"no answer in {self.timeout_seconds:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Busy(f"no answer in {self.timeout_seconds:g} s") from error
            raise self._failed(f"cannot be reached: {error.reason}") from error
        except ConnectionError as error:
            raise _Busy(str(error)) from error
        return self._text(raw)

    def _text(self, raw: bytes) -> str:
        try:
            if len(raw) > _MOST_BYTES:
                raise ValueError("more than a megabyte")
            value: Any = json.loads(raw)
            text = value["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise self._failed(f"gave no chat completion: {raw[:200].decode('utf-8', 'replace')!r}") from error
        return text if isinstance(text, str) else ""

    def _failed(self, why: str) -> CapabilityError:
        return CapabilityError(
            f"the chat model {self.model!r} at {self.url} {why}",
            "check prompt.llm (url, model, key_env), or take proposer: edits; the search goes on where it stopped",
            "chat_model",
        )


def _seconds(value: str | None) -> float:
    """Returns the seconds of a Retry-After header; a date counts as none."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
