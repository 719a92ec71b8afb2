"""Units to an encoder's inputs: opened, checked, decoded and processed, in worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mmtune.features.units import Unit
from mmtune.media.audio import decode_audio
from mmtune.media.image import decode_image
from mmtune.media.paths import MediaRefused, open_medium
from mmtune.media.video import decode_frames, probe_video
from mmtune.models.inputs import Inputs, Kind, Preparation, load_preparation
from mmtune.records import Reject


@dataclass(frozen=True)
class Job:
    """What a worker process needs to prepare units of one kind.

    Attributes:
        encodes: What the encoder takes.
        path: The encoder's folder or hub id.
        limits: ``max_pixels``, ``max_seconds`` and, for videos, ``frames``.
    """

    encodes: Kind
    path: str
    revision: str | None
    offline: bool
    media_root: str
    limits: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A unit's inputs.

    Attributes:
        sha256: Of the bytes of its file, text or history.
        inputs: One for each image, sound, text or history; of a video one for each frame.
        seconds: Of a video, when each frame is shown.
        reject: Why there are none.
    """

    unit: Unit
    sha256: str = ""
    inputs: tuple[Inputs, ...] = ()
    seconds: tuple[float, ...] = ()
    reject: dict[str, str] | None = None


class Preparer:
    """Prepares batches of units; every process has one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._preparation: Preparation = load_preparation(
            job.path, job.encodes, revision=job.revision, offline=job.offline
        )

    def __call__(self, units: Sequence[Unit]) -> list[Prepared]:
        """Returns the inputs of some units, in order, or why one has none."""
        return [self._one(unit) for unit in units]

    def _one(self, unit: Unit) -> Prepared:
        make = self._preparation.inputs
        if unit.medium is None:
            # The id of a text or history is its sha256.
            given = unit.items if unit.kind == "behaviour" else unit.text
            return Prepared(unit, unit.id.partition(":")[2], (make(given),))
        try:
            handle, _ = open_medium(self._job.media_root, unit.medium)
            with handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]
                handle.seek(0)
                shown, seconds = self._decoded(unit, handle)
            return Prepared(unit, digest, tuple(make(one) for one in shown), seconds)
        except MediaRefused as refused:
            reject = Reject(unit.where, unit.id, refused.code, refused.message)
        except (ValueError, ZeroDivisionError) as error:
            # Processors refuse shapes in their own words: a picture of one pixel, a sound of a few samples.
            text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            reject = Reject(unit.where, unit.id, "not_processed", f"{unit.id!r} does not fit the processor: {text}")
        return Prepared(unit, reject=asdict(reject))

    def _decoded(self, unit: Unit, handle: IO[bytes]) -> tuple[list[Any], tuple[float, ...]]:
        medium, limits = unit.medium, self._job.limits
        assert medium is not None
        if unit.kind == "image":
            return [decode_image(handle, medium, limits["max_pixels"])], ()
        if unit.kind == "audio":
            rate = self._preparation.sampling_rate_hz
            sound = decode_audio(handle, medium, rate, limits["max_seconds"])
            longest = self._preparation.longest_samples
            if longest and len(sound) > longest:
                raise MediaRefused(
                    "media_too_long",
                    f"{medium.named} is {len(sound) / rate:.1f} s long; the encoder hears {longest / rate:g} s",
                )
            return [sound], ()
        probed = probe_video(
            handle, medium, max_pixels=limits["max_pixels"], max_seconds=limits["max_seconds"], decode=False
        )
        handle.seek(0)
        count = limits["frames"]
        frames = decode_frames(handle, probed, count, limits["max_pixels"])
        last = probed.seconds * (probed.frames - 1) / probed.frames
        return list(frames), tuple(last * at / max(count - 1, 1) for at in range(count))


def file_sha256(media_root: str, unit: Unit) -> str:
    """Returns the sha256 of a unit's file; empty where it cannot be opened any more."""
    if unit.medium is None or unit.medium.data is not None:
        return unit.id.partition(":")[2]
    try:
        handle, _ = open_medium(Path(media_root), unit.medium)
    except MediaRefused:
        return ""
    with handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]
