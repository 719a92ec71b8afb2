"""Probing the media of many rows, each distinct medium once."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mmtune.media.paths import MediaRefused, check_relative
from mmtune.media.probe import ProbeLimits, probe_medium
from mmtune.records import Medium, Modality

MediumKey = tuple[Modality, str, str]
"""Modality, root and path."""
Probe = Medium | tuple[str, str]
"""A probed medium, or reason and detail of its refusal."""
_MOST = 100_000
"""Probed media that are remembered; about 400 bytes each."""


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """Where a source's media lie.

    Attributes:
        roots: Modality to the real folder that paths are relative to.
        prefixes: Modality to what stands before such a path below the common media root.
    """

    roots: Mapping[Modality, str]
    prefixes: Mapping[Modality, str]

    def key(self, medium: Medium) -> MediumKey:
        """Returns what tells a medium from every other of the build."""
        return medium.modality, self.roots.get(medium.modality, ""), medium.path


def media_places(roots: Sequence[Mapping[Modality, str]]) -> tuple[str, list[MediaPlace]]:
    """Returns the common parent of all media roots, and each source's place below it.

    Args:
        roots: Per source, modality to a real folder.
    """
    top = os.path.commonpath([root for own in roots for root in own.values()])
    places = []
    for own in roots:
        prefixes = {kind: os.path.relpath(root, top).replace(os.sep, "/") for kind, root in own.items()}
        places.append(MediaPlace(own, {kind: "" if text == "." else f"{text}/" for kind, text in prefixes.items()}))
    return top, places


class KnownMedia:
    """Probes remembered over a whole build, the longest unused forgotten first."""

    def __init__(self) -> None:
        self._probes: OrderedDict[MediumKey, Probe] = OrderedDict()

    def of(self, keys: Iterable[MediumKey]) -> dict[MediumKey, Probe]:
        """Returns the probes of those keys that are known."""
        found = {}
        for key in keys:
            if key in self._probes and key not in found:
                found[key] = self._probes[key]
                self._probes.move_to_end(key)
        return found

    def add(self, probes: Mapping[MediumKey, Probe]) -> None:
        """Remembers new probes."""
        self._probes.update(probes)
        while len(self._probes) > _MOST:
            self._probes.popitem(last=False)


class Prober:
    """Probes the media of one chunk of rows.

    Attributes:
        fresh: What was probed here, for ``KnownMedia``.
    """

    def __init__(self, place: MediaPlace, limits: ProbeLimits, known: Mapping[MediumKey, Probe]) -> None:
        self._place, self._limits, self._known = place, limits, known
        self.fresh: dict[MediumKey, Probe] = {}

    def probe(self, medium: Medium) -> Probe:
        """Returns the medium with header facts and its path below the common root, or its refusal.

        A history, which no file holds, comes back as it is.
        """
        if medium.modality == "behaviour":
            return medium
        # Embedded bytes are not remembered: they would be carried between processes again and again.
        keep = medium.data is None and not self._limits.embed
        key = self._place.key(medium)
        found = (self._known.get(key) or self.fresh.get(key)) if keep else None
        if found is None:
            found = self._look(medium)
            if keep:
                self.fresh[key] = found
        return found

    def _look(self, medium: Medium) -> Probe:
        try:
            if medium.path and medium.data is not None:
                check_relative(medium.path)
            found = probe_medium(self._place.roots[medium.modality], medium, self._limits)
            return replace(found, path=self._place.prefixes[medium.modality] + found.path) if found.path else found
        except MediaRefused as refused:
            return refused.code, refused.message
