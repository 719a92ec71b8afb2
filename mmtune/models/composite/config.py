"""The config of a composite model: its parts, how features enter the language model, and how modalities are fused."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

MODES = ("early", "late", "hybrid")
ATTENTIONS = ("none", "self", "cross", "co")
TOWERS = {"image": "vision", "audio": "audio", "behaviour": "behaviour"}
"""Modality to what its tower is called."""
MODALITIES = tuple(TOWERS)
"""In the order of their passes; a video is a run of images."""

_FUSION: dict[str, Any] = {
    "mode": "early",
    "attention": "none",
    "layers": [],
    "modality_dropout": 0.0,
    "auxiliary_loss": 0.0,
    "instruction": False,
}
_NO_WINDOW = (None, "full_attention")
# Heads that do more than one product would be lost, as the head here is one.
_HEAD_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class CompositeConfig(PreTrainedConfig):
    """Settings of ``CompositeForConditionalGeneration``.

    Attributes:
        text_config: Any causal language model known to AutoConfig.
        vision_config: Any image encoder known to AutoModel, or None.
        audio_config: Any sound encoder known to AutoModel, or None.
        image_token_id: The id that stands for one image token.
        behaviour_config: Any encoder of item ids known to AutoModel, or None.
        audio_token_id: The id that stands for one sound token.
        behaviour_token_id: The id that stands for one token of a history.
        vision_feature_layer: Which hidden states of the image encoder are used; None takes its last, normed ones.
        vision_feature_select_strategy: ``default`` drops the tokens that stand before the patches, ``full`` keeps them.
        audio_feature_layer: As ``vision_feature_layer``.
        audio_convolutions: ``(kernel, stride, padding)`` of each convolution between the frames that the feature
            extractor makes and the encoder's tokens; None where a sound always takes the same number of tokens.
        projectors: Per modality ``{kind: linear | mlp | perceiver | qformer, ...}``, see ``projector.build``.
        fusion: ``mode`` early, late or hybrid; ``attention`` none, self, cross or co; ``layers`` of the language
            model before which cross- or co-attention stands; ``modality_dropout`` while training; ``auxiliary_loss``
            the share of the training loss that is what the passes lose alone; ``instruction`` lets the instruction's
            embedding move the gate.
        frame_times: Frames of videos are told the second at which they were taken.
    """

    model_type = "mmtune_composite"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
        "behaviour_config": SubConfigSpec(config_class=AutoConfig, model_type="mmtune_history", optional=True),
    }

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    behaviour_config: Any = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    behaviour_token_id: int | None = None
    vision_feature_layer: int | None = -2
    vision_feature_select_strategy: str = "default"
    audio_feature_layer: int | None = None
    audio_convolutions: list | None = None
    projectors: Any = None
    fusion: Any = None
    frame_times: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.projectors = {name: {"kind": "mlp", **(self.projectors or {}).get(name, {})} for name in self.modalities}
        self.fusion = {**_FUSION, **(self.fusion or {})}
        _check(self)
        if not self.tie_word_embeddings and self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it has an encoder for, in the order of ``MODALITIES``."""
        return tuple(name for name in MODALITIES if getattr(self, f"{TOWERS[name]}_config") is not None)

    @property
    def kinds(self) -> int:
        """Kinds of tokens that it tells apart: text, image and audio, and behaviour where it reads that."""
        return 4 if "behaviour" in self.modalities else 3

    @property
    def reads_prompt(self) -> bool:
        """Whether it matters to it which tokens are the prompt, and not the answer."""
        return self.fusion["attention"] in ("self", "co") or self.reads_instruction

    @property
    def media_read_prompt(self) -> bool:
        """Whether what media become depends on the question they stand with: then questions share none."""
        return self.fusion["attention"] in ("self", "co") or any(map(self.resampler_reads, self.modalities))

    @property
    def reads_instruction(self) -> bool:
        """Whether the instruction's embedding conditions the gate or a resampler."""
        gated = self.fusion["instruction"] and self.fusion["mode"] != "early"
        return bool(gated or any(self.resampler_reads(name) for name in self.modalities))

    def resampler_reads(self, modality: str) -> bool:
        """Returns whether a modality's resampler is conditioned by the instruction."""
        return bool(self.projectors[modality].get("instruction", False))

    @property
    def branches(self) -> tuple[str, ...]:
        """What the gate mixes: ``joint``, the modalities alone, or both."""
        joint = ("joint",) if self.fusion["mode"] != "late" or not self.modalities else ()
        return joint if self.fusion["mode"] == "early" else (*joint, *self.modalities)


def _check(config: CompositeConfig) -> None:
    fusion = config.fusion
    unknown = sorted(fusion.keys() - _FUSION.keys())
    if unknown:
        raise ValueError(f"fusion has no setting {unknown[0]!r}; it has {', '.join(_FUSION)}")
    for name, known in (("mode", MODES), ("attention", ATTENTIONS)):
        if fusion[name] not in known:
            raise ValueError(f"fusion.{name} is {fusion[name]!r}; it is one of {', '.join(known)}")
    if not 0 <= fusion["modality_dropout"] < 1:
        raise ValueError(f"fusion.modality_dropout is {fusion['modality_dropout']}; it is in [0, 1)")
    if not 0 <= fusion["auxiliary_loss"] <= 1:
        raise ValueError(f"fusion.auxiliary_loss is {fusion['auxiliary_loss']}; it is in [0, 1]")
    if fusion["auxiliary_loss"] and fusion["mode"] == "early":
        raise ValueError("fusion.auxiliary_loss is for fusion.mode late and hybrid: early fusion has one pass")
    text, layers = config.text_config, fusion["layers"]
    if (fusion["attention"] in ("cross", "co")) != bool(layers):
        raise ValueError("fusion.layers names the layers of fusion.attention cross and co, and of no other")
    if any(not 0 <= layer < text.num_hidden_layers for layer in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"fusion.layers is {layers}; the language model has layers 0 to {text.num_hidden_layers - 1}")
    windowed = any(kind not in _NO_WINDOW for kind in getattr(text, "layer_types", None) or ())
    if fusion["attention"] == "self" and (windowed or getattr(text, "sliding_window", None)):
        raise ValueError("fusion.attention self needs a language model whose layers have no sliding window")
    for modality in config.modalities:
        if config.resampler_reads(modality) and config.projectors[modality]["kind"] not in ("perceiver", "qformer"):
            raise ValueError(f"projectors.{modality}.instruction is for a perceiver or qformer")
        if getattr(config, f"{modality}_token_id") is None:
            raise ValueError(f"the model reads {modality}, but {modality}_token_id is not set")
    scale = next((name for name in _HEAD_SCALES if getattr(text, name, None) not in (None, 1.0)), None)
    if scale:
        raise ValueError(f"{text.model_type} with {scale} is not supported: its head is no plain product")
