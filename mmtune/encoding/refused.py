"""The one way a row is turned away while it is encoded."""

from __future__ import annotations


class Refused(Exception):
    """A row that cannot be encoded; the stage counts it under ``reason``.

    Attributes:
        reason: A short reason code, such as ``template_refused``.
        detail: One sentence for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
