"""Which parameters belong to which tower: vision, audio, behaviour, projector, fusion, llm.

transformers names the parts of its multimodal models alike within a few words; the first
pattern that matches a parameter's dotted name decides, and the rest is the language model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

TOWERS = ("llm", "projector", "vision", "audio", "behaviour", "fusion")

# Order matters: a projector may sit inside a tower's module (Qwen's `visual.merger`).
_PATTERNS: tuple[tuple[str, str], ...] = (
    # What a composite model puts around its language model; a mixture of experts has gates too, deeper inside.
    ("fusion", r"model\.(gate|segments|media_attention)"),
    (
        "projector",
        r"multi_?modal_projector|connector|aligner|mlp1|embed_vision|embed_audio|audio_projector|behaviour_projector"
        r"|img_projection|image_newline|up_proj_for_(speech|vision_speech)|down_proj_for_(speech|vision_speech)"
        r"|\w*merger(_list)?|qformer|resampler|perceiver",
    ),
    ("behaviour", r"behaviour_tower"),
    ("audio", r"audio_tower|audio_model|audio_encoder|audio_embed|speech_encoder|encoder_audio"),
    ("vision", r"vision_tower|vision_model|visual|vision_encoder|image_encoder|image_embed|vision_embed_tokens"),
)
_ADAPTERS = ((".lora_", "lora"), (".ia3_", "ia3"), ("prompt_encoder.", "prompt"), ("soft_tokens.", "prompt"))
# PEFT keeps the weights that a trained copy stands in for.
_REPLACED = ".original_module."
_MEDIA_GATE = re.compile(r"(^|\.)model\.media_attention\..*gate$")
_COMPILED = tuple((tower, re.compile(rf"(^|\.)({pattern})(\.|$)")) for tower, pattern in _PATTERNS)


def tower_of(name: str) -> str:
    """Returns the tower of a parameter or module by its dotted name."""
    clean = _clean(name)
    return next((tower for tower, pattern in _COMPILED if pattern.search(clean)), "llm")


def _clean(name: str) -> str:
    return name.replace("base_model.model.", "", 1)


@dataclass(frozen=True, slots=True)
class TowerRow:
    """One line of the table that is shown before training.

    Attributes:
        state: ``lora``, ``ia3``, ``prompt``, ``full``, ``frozen`` or ``absent``.
    """

    tower: str
    state: str
    parameters: int
    trainable: int


def check_towers(model: nn.Module, train: Iterable[str], section: str = "finetune") -> None:
    """Raises RecipeError when a tower to train, by that section of the recipe, does not exist in the model."""
    present = {tower_of(name) for name, _ in model.named_parameters()}
    for tower in train:
        if tower not in present:
            raise RecipeError(
                f"{section}.train names the tower `{tower}`, which this model does not have",
                f"it has: {', '.join(t for t in TOWERS if t in present)}",
                "no_such_tower",
            )


def tower_table(model: nn.Module) -> list[TowerRow]:
    """Returns parameters and trainable parameters per tower, adapters counted to their tower."""
    from mmtune.models.spread import numel

    total = dict.fromkeys(TOWERS, 0)
    trainable = dict.fromkeys(TOWERS, 0)
    states = dict.fromkeys(TOWERS, "full")
    for name, parameter in model.named_parameters():
        if _REPLACED in name:
            continue
        tower = tower_of(name)
        total[tower] += numel(parameter)
        if parameter.requires_grad:
            trainable[tower] += numel(parameter)
            states[tower] = next((state for part, state in _ADAPTERS if part in name), states[tower])
    rows = []
    for tower in TOWERS:
        state = "absent" if not total[tower] else "frozen"
        if trainable[tower]:
            state = states[tower]
        rows.append(TowerRow(tower, state, total[tower], trainable[tower]))
    return rows


def shut_gates(model: nn.Module) -> list[str]:
    """Returns the gates that all media must pass on their way to the text, where every one is 0 and stays so."""
    gates = {name: own for name, own in model.named_parameters() if _MEDIA_GATE.search(name) and _REPLACED not in name}
    return [] if any(own.requires_grad or bool(own.any()) for own in gates.values()) else [*map(_clean, gates)]


def shown_towers(table: Iterable[TowerRow]) -> tuple[str, tuple[str, ...], list[tuple[str, str, int, int]]]:
    """Returns title, head and rows of what trains, for a person: of the towers that a model holds."""
    rows = [(row.tower, row.state, row.parameters, row.trainable) for row in table if row.parameters]
    return "what trains", ("tower", "state", "parameters", "trainable"), rows


def tower_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns state and trainable parameters per tower, for a manifest."""
    return {row.tower: {"state": row.state, "trainable": row.trainable} for row in tower_table(model)}


def linear_names(model: nn.Module, towers: Iterable[str], targets: Iterable[str] | None) -> list[str]:
    """Returns the full names of the linear layers to adapt, sorted.

    Args:
        model: The base model.
        towers: Towers that train.
        targets: Last parts of module names, or None for every linear layer but the output head.

    Raises:
        RecipeError: Nothing matches, one of the targets matches nothing, or one is a head that mixes passes.
    """
    import difflib

    from torch import nn

    wanted, found, known = set(towers), [], set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = None if targets is None else list(targets)
    matched: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or tower_of(name) not in wanted:
            continue
        known.add(name.rsplit(".", 1)[-1])
        if names is None:
            if module is not head:
                found.append(name)
        else:
            hits = [target for target in names if name == target or name.endswith(f".{target}")]
            matched.update(hits)
            if hits:
                found.append(name)
                _refuse_mixing_head(model, name, module is head)
    lost = [] if names is None else [target for target in names if target not in matched]
    if lost or not found:
        what = (
            f"finetune.lora.targets: {', '.join(lost)} matches no linear layer" if lost else "no linear layer to adapt"
        )
        near = difflib.get_close_matches(lost[0], sorted(known), n=3) if lost else []
        hint = f"near: {', '.join(near)}" if near else f"there are: {', '.join(sorted(known))}"
        raise RecipeError(f"{what} in {', '.join(sorted(wanted))}", hint, "no_targets")
    return sorted(found)


def _refuse_mixing_head(model: Any, name: str, is_head: bool) -> None:
    """Raises RecipeError for the head of late and hybrid fusion: what it takes is several passes, side by side."""
    if is_head and len(getattr(model.config, "branches", ())) > 1:
        raise RecipeError(
            f"finetune.lora.targets: {name} mixes the passes of the fusion and takes no adapter",
            "leave it out",
            "mixing_head",
        )


def whole_modules(model: nn.Module, tower: str) -> list[str]:
    """Returns the names of a tower's outermost modules that can be called."""
    from torch import nn

    found: list[str] = []
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in found)
        if tower_of(name) == tower and not within and not isinstance(module, nn.ModuleDict | nn.ModuleList):
            found.append(name)
    return found


def fingerprints(model: nn.Module) -> dict[str, bytes]:
    """Returns a digest per parameter, to see after a step what moved."""
    return {name: _digest(parameter) for name, parameter in model.named_parameters()}


def _digest(parameter: torch.Tensor) -> bytes:
    import torch

    from mmtune.models.spread import own_part

    flat = own_part(parameter).detach().reshape(-1)
    if flat.is_meta:
        return b"released"
    if flat.device.type == "cpu":
        return hashlib.blake2b(flat.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
    # On an accelerator a checksum of the bits is enough and stays there.
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return str(flat.view(whole).sum(dtype=torch.int64).item()).encode()


def moved_towers(before: Mapping[str, bytes], model: nn.Module) -> tuple[set[str], set[str], list[str]]:
    """Compares with an earlier ``fingerprints``; parameters that have none there are left out.

    Returns:
        Towers of which a trainable parameter moved, towers of which none did although some
        are trainable, and names of frozen parameters that moved.
    """
    moved: set[str] = set()
    trainable: set[str] = set()
    wrong: list[str] = []
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        changed = _digest(parameter) != before[name]
        if parameter.requires_grad:
            trainable.add(tower_of(name))
            if changed:
                moved.add(tower_of(name))
        elif changed:
            wrong.append(name)
    return moved, trainable - moved, wrong
