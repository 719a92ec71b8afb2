"""doctor: versions, devices, decoders, disk; what is missing and how to install it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.storage import library_versions

# Import name, extra, what it is for.
_EXTRAS: tuple[tuple[str, str, str], ...] = (
    ("soundfile", "audio", "reading flac, ogg and mp3"),
    ("av", "video", "reading video"),
    ("bitsandbytes", "qlora", "4-bit base weights"),
    ("faiss", "retrieval", "search in large pools"),
    ("liger_kernel", "fast", "fused GPU kernels"),
    ("trl", "preference", "preference tuning"),
    ("cma", "prompt", "prompt search by black-box tuning"),
    ("optuna", "prompt", "prompt search by mipro"),
    ("gepa", "prompt", "prompt search by gepa"),
    ("tensorboard", "trackers", "tensorboard logs"),
)
# First interpreter of each line whose tarfile filters cannot be bypassed (CVE-2025-4517).
_SAFE_PYTHON = {11: 13, 12: 11, 13: 4}


def examine() -> dict[str, Any]:
    """Returns everything that a bug report should carry; no secrets and no host names."""
    advice: list[str] = []
    extras = []
    for module, extra, purpose in _EXTRAS:
        present = importlib.util.find_spec(module) is not None
        extras.append({"extra": extra, "module": module, "present": present, "for": purpose})
        if not present:
            advice.append(f'{purpose}: pip install "mmtune[{extra}]"')
    minor, micro = sys.version_info.minor, sys.version_info.micro
    if micro < _SAFE_PYTHON.get(minor, 0):
        advice.append(
            f"Python 3.{minor}.{micro} has known faults in tarfile; 3.{minor}.{_SAFE_PYTHON[minor]} mends them"
        )
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return {
        "mmtune": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "libraries": library_versions(),
        "devices": _devices(),
        "decoders": {"image": _try_image(), "audio": _try_audio(), "video": importlib.util.find_spec("av") is not None},
        "extras": extras,
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "atomic_rename": _try_rename(),
        "offline": HF_HUB_OFFLINE,
        "advice": advice,
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append({"name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1)})
    return found


def _try_image() -> bool:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "JPEG")
    buffer.seek(0)
    with Image.open(buffer, formats=("JPEG",)) as picture:
        picture.load()
        return picture.size == (8, 8)


def _try_audio() -> bool:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0\0" * 80)
    buffer.seek(0)
    with wave.open(buffer, "rb") as sound:
        return sound.getnframes() == 80


def _try_rename() -> bool:
    with tempfile.TemporaryDirectory(dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None) as folder:
        source, target = Path(folder) / "a", Path(folder) / "b"
        source.mkdir()
        (source / "x").write_text("1")
        os.rename(source, target)
        return (target / "x").is_file()


def _states(extras: list[dict[str, Any]]) -> dict[str, str]:
    """Returns every extra once: ``ok``, ``-``, or which of its modules are missing."""
    states = {}
    for name in dict.fromkeys(one["extra"] for one in extras):
        own = [one for one in extras if one["extra"] == name]
        missing = [one["module"] for one in own if not one["present"]]
        states[name] = "ok" if not missing else "-" if len(missing) == len(own) else f"without {' and '.join(missing)}"
    return states


def render(result: dict[str, Any]) -> str:
    """Returns the examination as plain text to paste into a report."""
    lines = [
        f"mmtune {result['mmtune']}, Python {result['python']}, {result['platform']}, {result['cores']} cores",
        "libraries   " + ", ".join(f"{name} {version}" for name, version in result["libraries"].items()),
        "devices     " + "; ".join(", ".join(f"{v}" for v in device.values()) for device in result["devices"]),
        "decoders    " + ", ".join(f"{name} {'ok' if ok else 'missing'}" for name, ok in result["decoders"].items()),
        "extras      " + ", ".join(f"{extra} {state}" for extra, state in _states(result["extras"]).items()),
        f"disk        {result['disk_free_gib']} GiB free here",
        f"rename      {'atomic' if result['atomic_rename'] else 'FAILS: choose another disk for run_dir'}",
    ]
    lines += [f"advice      {line}" for line in result["advice"]]
    return "\n".join(lines)
