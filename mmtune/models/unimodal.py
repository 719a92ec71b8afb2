"""Any encoder that transformers' AutoModel knows, and the features that it makes of a batch.

CLIP and SigLIP (whole or one tower), DINO, ViT; Whisper, wav2vec2, AST; BERT-like models and language models; the
towers of a vision-language or audio-language model; the small encoders of ``encoders``.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmtune.errors import CapabilityError, DataError, IntegrityError, RecipeError
from mmtune.models.encoders import masked_mean
from mmtune.models.inputs import Inputs, Kind
from mmtune.models.linear import fuse_linears
from mmtune.models.load import load_config, load_model

Pool = Literal["auto", "mean", "first", "last", "pooler", "stats"]
_Made = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Tokens ``(B, N, D)``, mask ``(B, N)`` or None, and the model's own pooled vectors ``(B, D)`` or None."""


@dataclass(frozen=True)
class Encoded:
    """The features of one image, sound, text or history.

    Attributes:
        tokens: ``(N, D)`` float32.
        pooled: ``(D,)`` float32; as long as the pooling makes it.
    """

    tokens: np.ndarray
    pooled: np.ndarray


@dataclass(frozen=True)
class Unimodal:
    """A frozen model as the encoder of one modality.

    Attributes:
        model: In evaluation mode.
        kind: What it encodes.
        pool: How tokens become one vector; see ``pooled``.
    """

    model: Any
    kind: Kind
    pool: Pool = "auto"

    def __call__(self, batch: Sequence[Inputs]) -> list[Encoded]:
        """Returns the features of every member of a batch, without padding.

        Members of different lengths are padded where the model heeds a mask, and go apart where it does not.
        """
        out: list[Encoded | None] = [None] * len(batch)
        for rows in self._groups(batch):
            for row, made in zip(rows, self._together([batch[row] for row in rows]), strict=True):
                out[row] = made
        return [one for one in out if one is not None]

    def _groups(self, batch: Sequence[Inputs]) -> list[list[int]]:
        if self.kind in ("text", "behaviour") or hasattr(self.model, "feature_mask"):
            return [list(range(len(batch)))]
        if self._base_way() is not None and not _joins(batch[0]):
            return [[row] for row in range(len(batch))]
        if "image_grid_thw" in batch[0]:
            return [list(range(len(batch)))]
        if _heeds_mask(self.model) and all("attention_mask" in one for one in batch):
            return [list(range(len(batch)))]
        alike: dict[Any, list[int]] = {}
        for row, one in enumerate(batch):
            alike.setdefault(tuple((name, value.shape) for name, value in one.items()), []).append(row)
        return list(alike.values())

    def _together(self, batch: Sequence[Inputs]) -> list[Encoded]:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            base = self._base_way()
            if base is not None:
                return base(batch, device)
            tensors = {name: value.to(device) for name, value in padded(batch).items()}
            tokens, mask, own = self._forward(tensors)
            vectors = pooled(tokens, mask, own, self.pool).float().cpu().numpy()
            rows = tokens.float().cpu().numpy()
            lengths = [rows.shape[1]] * len(rows) if mask is None else mask.sum(1).tolist()
        return [
            Encoded(row[: int(length)].copy(), vector)
            for row, length, vector in zip(rows, lengths, vectors, strict=True)
        ]

    def _forward(self, tensors: dict[str, torch.Tensor]) -> _Made:
        getter = getattr(self.model, f"get_{self.kind}_features", None)
        if getter is not None:
            made = getter(**_known(getter, tensors), return_dict=True)
            mask = tensors.get("attention_mask" if self.kind == "text" else "pixel_attention_mask")
            return _sequence(made.last_hidden_state), mask, made.pooler_output
        model = self._inner()
        extra = {"use_cache": False} if self.kind == "text" and _is_decoder(model) else {}
        made = model(**_known(model.forward, tensors), **extra, return_dict=True)
        tokens, own = _sequence(made.last_hidden_state), getattr(made, "pooler_output", None)
        if self.kind == "text" and self.pool == "auto":
            # A language model's own pooler was made for another task than comparing texts.
            own = None
        return tokens, self._mask(model, tensors, tokens.shape[1]), own

    def _inner(self) -> Any:
        if self.kind == "text" and _generates(self.model):
            return _language_model(self.model)
        if getattr(self.model.config, "is_encoder_decoder", False):
            return self.model.get_encoder()
        return self.model

    def _mask(self, model: Any, tensors: Mapping[str, torch.Tensor], tokens: int) -> torch.Tensor | None:
        mask = tensors.get("attention_mask", tensors.get("pixel_attention_mask"))
        if mask is None:
            return None
        if hasattr(model, "feature_mask"):
            return model.feature_mask(mask)
        if self.kind == "audio" and hasattr(model, "_get_feat_extract_output_lengths"):
            lengths = model._get_feat_extract_output_lengths(mask.sum(-1).long())
            return torch.arange(tokens, device=mask.device) < lengths.clamp(1, tokens)[:, None]
        return mask if mask.ndim == 2 and mask.shape[1] == tokens else None

    def _base_way(self) -> Callable[[Sequence[Inputs], Any], list[Encoded]] | None:
        """Returns how a generating model's towers are asked: what they give the language model are the tokens."""
        return self._towers if _generates(self.model) and self.kind in ("image", "audio") else None

    def _towers(self, batch: Sequence[Inputs], device: Any) -> list[Encoded]:
        getter = getattr(self.model, f"get_{self.kind}_features")
        joined = {name: value.to(device) for name, value in padded(batch).items()}
        found = getter(**_known(getter, joined), return_dict=True).pooler_output
        parts = [found.flatten(0, -2)] if len(batch) == 1 and torch.is_tensor(found) else list(found)
        if len(batch) == 1 and not torch.is_tensor(found):
            parts = [torch.cat([part.flatten(0, -2) for part in found])]
        rows = [part.float().reshape(-1, part.shape[-1]).cpu() for part in parts]
        vectors = [pooled(part[None], None, None, self.pool)[0].numpy() for part in rows]
        return [Encoded(part.numpy(), vector) for part, vector in zip(rows, vectors, strict=True)]


def _generates(model: Any) -> bool:
    """Says whether a model has towers whose outputs a language model reads."""
    return hasattr(model, "language_model") or hasattr(model, "connector")


def _language_model(model: Any) -> Any:
    return model.language_model if hasattr(model, "language_model") else model.text_model


def _joins(one: Inputs) -> bool:
    """Says whether a generating model takes several such members at once and gives them back one by one."""
    return "image_grid_thw" in one or (set(one) == {"pixel_values"} and one["pixel_values"].shape[0] == 1)


def _sequence(states: torch.Tensor) -> torch.Tensor:
    """Returns states as ``(B, N, D)``; a convolutional network's map is read row by row."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _known(call: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the inputs that a model names; the mask of a sound has a name of its own in some families."""
    names = inspect.signature(call).parameters
    found = {name: value for name, value in tensors.items() if name in names}
    other = next((name for name in names if name.endswith("features_mask") or name == "feature_attention_mask"), None)
    if "attention_mask" in tensors and other is not None:
        found = {name: value for name, value in found.items() if name != "attention_mask"}
        found[other] = tensors["attention_mask"]
    return found


def _heeds_mask(model: Any) -> bool:
    return "attention_mask" in inspect.signature(model.forward).parameters


def _is_decoder(model: Any) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def padded(batch: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """Returns arrays of one name joined along the first dimension, zeros behind the shorter ones along the last."""
    out = {}
    for name in batch[0]:
        arrays = [torch.from_numpy(np.ascontiguousarray(one[name])) for one in batch]
        longest = max(array.shape[-1] for array in arrays)
        out[name] = torch.cat([torch.nn.functional.pad(array, (0, longest - array.shape[-1])) for array in arrays])
    return out


def pooled(tokens: torch.Tensor, mask: torch.Tensor | None, own: torch.Tensor | None, pool: Pool) -> torch.Tensor:
    """Returns one vector per member, ``(B, D)``, or ``(B, 2 D)`` for ``stats``.

    Args:
        tokens: ``(B, N, D)``.
        mask: ``(B, N)``, or None where all tokens are there.
        own: What the model itself calls its pooled vector.
        pool: ``mean``, ``first``, ``last`` token, the model's own ``pooler``, ``stats`` (mean and standard deviation
            over the tokens, Snyder et al. 2018), or ``auto``: the model's own where there is one, else the mean.

    Raises:
        RecipeError: ``pooler`` of a model that has none.
    """
    if pool == "pooler" or (pool == "auto" and own is not None):
        if own is None:
            raise RecipeError("extract.encoders: this model has no pooler", "set pool: mean", "no_pooler")
        return own
    if pool == "first":
        return tokens[:, 0]
    if pool == "last":
        lengths = mask.sum(1).long() if mask is not None else torch.full((len(tokens),), tokens.shape[1])
        return tokens[torch.arange(len(tokens)), lengths.to(tokens.device).clamp(min=1) - 1]
    mean = masked_mean(tokens, mask)
    if pool != "stats":
        return mean
    spread = masked_mean((tokens - mean[:, None]) ** 2, mask).clamp(min=1e-12).sqrt()
    return torch.cat([mean, spread], dim=1)


def load_unimodal(
    path: str, kind: Kind, *, pool: Pool = "auto", revision: str | None = None, offline: bool = False
) -> Unimodal:
    """Returns the encoder in a folder or hub id, in evaluation mode, fp32, on the CPU.

    Raises:
        CapabilityError: It is not at hand, or the model has no part for this kind.
        DataError: Only pickled weights are there, or it wants code of its own.
        IntegrityError: Weights are missing, damaged or of another shape.
    """
    config = load_config(path, revision=revision, offline=offline)
    model = _load(path, config, revision, offline)
    generating = _generates(model)
    if kind in ("image", "audio") and generating and not hasattr(model, f"get_{kind}_features"):
        raise CapabilityError(
            f"{path} (model type {config.model_type}) gives no {kind} features",
            f"name an encoder: --set extract.encoders.{kind}=FOLDER_OR_HUB_ID",
            "no_tower",
        )
    expected = {"image": "pixel_values", "audio": "input_", "text": "input_ids", "behaviour": "input_ids"}[kind]
    own = getattr(model, f"get_{kind}_features", None) is not None or (kind == "text" and generating)
    if not own and not str(getattr(model, "main_input_name", "")).startswith(expected):
        raise CapabilityError(
            f"{path} (model type {config.model_type}) takes no {kind}",
            f"name an encoder: --set extract.encoders.{kind}=FOLDER_OR_HUB_ID",
            "no_tower",
        )
    fuse_linears(model)
    return Unimodal(model, kind, _sentence_pool(path, pool) if kind == "text" else pool)


def _load(path: str, config: Any, revision: str | None, offline: bool) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if type(config) not in AutoModel._model_mapping:
        model: Any = load_model(path, revision=revision, offline=offline)
        return getattr(model, "model", model)
    folder = Path(path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise DataError(f"{folder} holds no safetensors weights", "convert them to safetensors", "no_weights")
    try:
        model, info = _class_of(config).from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=offline,
            output_loading_info=True,
        )
    except OSError as error:
        raise CapabilityError(
            f"the encoder {path!r} cannot be loaded: {str(error).splitlines()[0]}",
            "check the name and the network, or name a folder on this machine",
            "model_unavailable",
        ) from error
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"the weights of {path} do not fit its config: {str(error).splitlines()[0]}", "fetch the model again"
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing and all(name.split(".")[0] == "pooler" for name in missing):
        # A checkpoint of a classifier: its pooler would be random.
        model.pooler = None
    elif missing:
        raise IntegrityError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}", "fetch the model again", "missing_weights"
        )
    return model.eval()


def _class_of(config: Any) -> Any:
    """Returns the class that loads an encoder: its own where it was saved without its decoder (T5EncoderModel)."""
    import transformers

    alone = next((name for name in config.architectures or () if name.endswith("EncoderModel")), "AutoModel")
    return getattr(transformers, alone, transformers.AutoModel)


def _sentence_pool(path: str, pool: Pool) -> Pool:
    """Returns the pooling that a sentence-transformers folder names, where ``auto`` was asked."""
    file = Path(path) / "1_Pooling" / "config.json"
    if pool != "auto" or not file.is_file():
        return pool
    asked = {name for name, on in json.loads(file.read_text("utf-8")).items() if name.startswith("pooling_mode") and on}
    known: dict[str, Pool] = {
        "pooling_mode_cls_token": "first",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "last",
    }
    if len(asked) != 1 or not asked <= set(known):
        raise CapabilityError(
            f"{file} asks for a pooling that is not known: {', '.join(sorted(asked))}",
            "set extract.encoders.text.pool",
            "unknown_pooling",
        )
    return known[asked.pop()]
