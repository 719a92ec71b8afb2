"""What a COCO file calls its images and categories, by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtune.readers.fields import id_field, text_field
from mmtune.readers.source import Refused

Id = int | str


class Ids:
    """The file names of images, or the names of categories, of one file.

    Args:
        what: ``image`` or ``category``.
        field: The field that holds the name.
        plural: What the file calls all of them.

    Attributes:
        names: By id; an id that stands for two names has none.
    """

    def __init__(self, what: str, field: str, plural: str) -> None:
        self.names: dict[Id, str] = {}
        self._what, self._field, self._plural = what, field, plural
        self._twice: set[Id] = set()

    def add(self, value: Mapping[str, Any]) -> None:
        """Takes an entry; the same one may stand twice.

        Raises:
            Refused: Its id is that of another name already, as where files were joined.
        """
        own, name = id_field(value, "id"), text_field(value, self._field)
        known = self.names.get(own, name)
        if own in self._twice or known != name:
            self._twice.add(own)
            self.names.pop(own, None)
            raise Refused("duplicate_id", f"/id: {self._what} {own} stands for {name!r} and for another {self._field}")
        self.names[own] = name

    def of(self, value: Mapping[str, Any], reason: str) -> Id:
        """Returns the id that an annotation names, which has a name.

        Raises:
            Refused: ``duplicate_id``, or the given reason where it is not in the file.
        """
        key = f"{self._what}_id"
        own = id_field(value, key)
        if own in self._twice:
            raise Refused("duplicate_id", f"/{key}: {self._what} {own} stands twice among the file's {self._plural}")
        if own not in self.names:
            raise Refused(reason, f"/{key}: {self._what} {own} is not among the file's {self._plural}")
        return own
