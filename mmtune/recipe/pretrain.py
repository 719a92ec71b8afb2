"""The recipe's section for pretrain; its field docs are also the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmtune.recipe.section import Section, Tower, Weight

Modality = Literal["image", "audio", "behaviour"]
Part = Literal["text", "image", "audio", "behaviour"]
Objective = Literal["caption", "reconstruction", "adversarial", "contrastive", "masked", "match"]

Rate = Annotated[float, Field(gt=0, le=10)]
# Where other modalities enter.
_ELSEWHERE = {
    "video": "a video is its sampled frames, which the encoder of image reads with their times",
    "text": "text is read by the language model that build.text names",
}
# Half of the loss, chosen on held-out scans and recordings (tests/bench/bench_interaction.py).
_AUXILIARY = 0.5
TOWER_OF: dict[str, Tower] = {"text": "llm", "image": "vision", "audio": "audio", "behaviour": "behaviour"}
"""The tower that a part becomes."""


class Projector(Section):
    """pretrain.build.projectors: how the features of one encoder enter the language model."""

    kind: Literal["linear", "mlp", "perceiver", "qformer"] = "mlp"
    """linear and mlp keep the number of tokens; perceiver and qformer give one per query."""
    queries: Annotated[int, Field(ge=1, le=1024)] = 32
    """Tokens that a perceiver or qformer makes of a medium."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Depth of a perceiver or qformer."""
    heads: Annotated[int, Field(ge=1, le=128)] = 8
    """Attention heads of a perceiver or qformer."""
    instruction: bool = False
    """Let a perceiver or qformer read the question: the mean of what the user says in the medium's turn."""


class Fusion(Section):
    """pretrain.build.fusion: how modalities meet."""

    mode: Literal["early", "late", "hybrid"] = "early"
    """early puts features into the sequence; late mixes a pass per modality under a gate; hybrid adds one of all."""
    attention: Literal["none", "self", "cross", "co"] = "none"
    """self: media and question see each other both ways (MMBT); cross: gated cross-attention (Flamingo); co: two
    streams (ViLBERT)."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers of the language model before which cross- or co-attention stands, from 0."""
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of each modality of a row to be hidden in a training step; its last one stays."""
    auxiliary_loss: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """Share of the training loss, here and in finetune, that is what each pass of late and hybrid fusion loses by the
    answer that it would give alone, their mean; the rest is the mixture's. 0: a pass learns by its part in the mixture,
    which leaves a weaker one little to learn from (Wang et al. 2020). auto: 0.5, and 0 with early."""
    instruction: bool = False
    """The embedding of the question, the mean of what the user says in the last turn, moves the gate of late and hybrid
    fusion."""

    @model_validator(mode="after")
    def _mixes_passes(self) -> Fusion:
        if self.auxiliary_loss not in ("auto", 0) and self.mode == "early":
            raise ValueError("auxiliary_loss is for mode late and hybrid: early fusion has one pass")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the model's config takes."""
        usual = 0.0 if self.mode == "early" else _AUXILIARY
        share = usual if self.auxiliary_loss == "auto" else self.auxiliary_loss
        return {**self.model_dump(), "layers": list(self.layers), "auxiliary_loss": share}


class Parts(Section):
    """pretrain.build: what the model is made of."""

    text: str | dict[str, Any]
    """The causal language model: folder or hub id, or a config such as {model_type: llama, hidden_size: 64}."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where text is a config; its size is the vocabulary."""
    encoders: dict[Modality, str | dict[str, Any]] = Field(min_length=1)
    """image, audio and behaviour to a folder or hub id of an encoder, or to a config; without model_type it is that of
    a small encoder: patches for images, log-mel convolutions for sounds, and for histories an embedding of each item
    (those of the training rows' histories) and of its recency; of a history the newest `window` (20) are read, and
    while items are learned `unknown_rate` (0.05) of them are told as unknown."""
    projectors: dict[Modality, Projector] = {}
    """image, audio and behaviour to their projectors; left out: mlp."""
    fusion: Fusion = Fusion()
    """How modalities meet."""

    @field_validator("encoders", mode="before")
    @classmethod
    def _of_what_has_one(cls, value: Any) -> Any:
        named = sorted(_ELSEWHERE.keys() & value.keys()) if isinstance(value, dict) else []
        if named:
            raise ValueError(f"there is no encoder of {named[0]}: {_ELSEWHERE[named[0]]}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Parts:
        if isinstance(self.text, dict) and self.tokenizer is None:
            raise ValueError("text is a config: give tokenizer, a folder or hub id")
        if isinstance(self.text, str) and self.tokenizer is not None:
            raise ValueError("text is a pretrained model, which has its own tokenizer: leave out tokenizer")
        idle = sorted(set(self.projectors) - set(self.encoders))
        if idle:
            raise ValueError(f"projectors names {idle[0]}, which has no encoder")
        return self

    @property
    def reads_items(self) -> bool:
        """Whether an encoder of histories is built, whose items are those of the training rows."""
        return isinstance(self.encoders.get("behaviour"), dict)


class Codes(Section):
    """pretrain.codes: one vector per part of a row, for reconstruction, adversarial and contrastive."""

    modalities: tuple[Part, ...] = ()
    """Which parts; left out: all encoders, and text (question and answer) where there is one encoder."""
    sources: tuple[str, ...] = ()
    """Ids of the sources whose rows codes are learned from; left out: all. Name those whose parts belong together: a
    row that asks whether two media fit, and shows two that do not, would teach codes to find what is not theirs."""
    width: Annotated[int, Field(ge=1)] = 32
    """Numbers of a code."""
    feature_noise: Annotated[float, Field(ge=0)] = 0.0
    """Deviation of the noise on features before codes are made of them in training; that of their own numbers is 1.
    Codes of new media, which vary more than those of training media, then lie where those do."""
    sphere: bool = False
    """Bring every code to one length, the root of its width, so that only its direction says anything, which is what
    contrastive compares. A code of a medium that its encoder is unsure of is short, and so tells its part."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Chance of each part to be kept from the joint code that is decoded, so that others learn to fill it in."""
    game: Literal["reversal", "alternating"] = "reversal"
    """Who moves in the adversarial game. reversal: both players in every step, the gradient of one reversed;
    alternating: the discriminators in one step, encoders and generators in the next."""
    form: Literal["minimax", "non_saturating"] = "non_saturating"
    """What encoders and generators minimise in their turn of an alternating game; minimax is flat once they lose."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Deviation of the noise through which the discriminator of the adversarial game sees codes while it trains; that
    of their own numbers is 1. It stays unsure of codes that lie apart by less, and so says which way they should go."""
    gradient_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of what the discriminator of the adversarial game pays for answers that change steeply from code to code
    (R1), such as 0.1. Codes that lie close then get one answer, also new ones, and less noise is wanted."""


class Pretrain(Section):
    """pretrain: parts and tokens/ to base/."""

    build: Parts
    """The parts of the model."""
    objectives: dict[Objective, Weight] = {"caption": 1.0}
    """Weights of what is minimised: caption (the answers), reconstruction (every part out of one code), adversarial (a
    discriminator may not know a code's part, and generators fill in the code of a missing one), contrastive (codes of
    a row find each other), masked (hidden words and media are found), match (do media and text belong together)."""
    task_weights: dict[str, Weight] = {}
    """Weights of the label tokens of tasks in caption, by the task's name; 1 for others."""
    codes: Codes = Codes()
    """One vector per part of a row, for the objectives that need them."""
    train: Literal["all"] | tuple[Tower, ...] = "all"
    """Towers that train: all, or some of llm, projector, vision, audio, behaviour; what joins the parts (gate,
    segments, attention to media) trains with the projector."""
    unfreeze: dict[Part, Annotated[float, Field(gt=0)]] = {}
    """Epochs for which a part stays frozen first, such as {image: 3, text: 5} (MMBT)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; ignored when max_steps is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    learning_rate: Rate = 1.0e-3
    """Peak learning rate."""
    tower_rates: dict[Tower, Rate] = {}
    """Peak learning rates of single towers; the others take learning_rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of the steps, else a number of steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of hidden layers, AdamW for the rest."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay on matrices."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """AdamW second moment decay."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Rows per micro batch; contrastive, adversarial and match compare the rows of one."""
    batch_tokens: Annotated[int, Field(ge=1)] = 65536
    """Most padded tokens per micro batch."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro batches per optimizer step."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    save_every: Annotated[int, Field(ge=1)] = 200
    """Checkpoint every so many optimizer steps."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Validation loss every so many optimizer steps; always at the end when there is a val split."""
    eval_rows: Annotated[int, Field(ge=1)] = 512
    """At most so many rows for the validation loss."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """A line of metrics every so many optimizer steps."""

    @model_validator(mode="after")
    def _fits_together(self) -> Pretrain:
        if not any(self.objectives.values()):
            raise ValueError("the weights of the objectives sum to 0: give one of them a weight above 0")
        known = {"text", *self.build.encoders}
        for key, named in (("unfreeze", self.unfreeze), ("codes.modalities", self.codes.modalities)):
            strange = sorted(set(named) - known)
            if strange:
                raise ValueError(f"{key} names {strange[0]}, which pretrain.build does not have")
        if self.train != "all":
            if not self.train:
                raise ValueError("train: name at least one tower; freezing everything would train nothing")
            still = sorted(part for part in self.unfreeze if TOWER_OF[part] not in self.train)
            if still:
                raise ValueError(f"unfreeze names {still[0]}, which does not train")
            idle = sorted(set(self.tower_rates) - set(self.train))
            if idle:
                raise ValueError(f"tower_rates names {idle[0]}, which does not train")
        compared = [name for name in ("contrastive", "match") if self.objectives.get(name)]
        if compared and self.batch_rows < 2:
            raise ValueError(
                f"objective {compared[0]} compares the rows of a micro batch: batch_rows must be 2 or more"
            )
        early = [name for name in ("masked", "match") if self.objectives.get(name)]
        if early and self.build.fusion.mode != "early":
            raise ValueError(f"objective {early[0]} goes with build.fusion.mode early")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The objectives that count."""
        return {str(name): weight for name, weight in self.objectives.items() if weight}


def part_paths(pretrain: Any, resolve: Callable[[str], str]) -> Any:
    """Returns the section's values with the paths of its parts resolved.

    Args:
        pretrain: What stands in the recipe, not checked yet.
        resolve: A path as written to an absolute one, or to a hub id.
    """
    build = pretrain.get("build") if isinstance(pretrain, dict) else None
    if not isinstance(build, dict):
        return pretrain
    found = dict(build)
    for name in ("text", "tokenizer"):
        if isinstance(found.get(name), str):
            found[name] = resolve(found[name])
    if isinstance(found.get("encoders"), dict):
        found["encoders"] = {
            name: resolve(value) if isinstance(value, str) else value for name, value in found["encoders"].items()
        }
    return {**pretrain, "build": found}
