"""The recipe's section for extract; its field docs are also the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmtune.recipe.section import Section, Workers

FeatureKind = Literal["image", "audio", "video", "text", "behaviour"]


BASE = "base"
"""The name of the base model's own states among encoders; a folder of that name is ./base."""


class Encoder(Section):
    """The encoder of one modality: a folder or hub id, or a small one built from settings."""

    path: str | None = None
    """Folder or hub id of any model that transformers' AutoModel knows, with its processor; base: the base model's own
    towers and last hidden states; not for behaviour."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    config: dict[str, int | float] | None = None
    """Instead of path: settings of a small encoder with random weights, such as {hidden_size: 64}; it is written to
    features/encoders/ (images: patches; sounds: log-mel convolutions; behaviour: items with recency positions)."""
    pool: Literal["auto", "mean", "first", "last", "pooler", "stats"] = "auto"
    """How tokens become one vector: the model's own pooler where there is one, else the mean (auto); mean, first or
    last token; stats is mean and standard deviation."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Encoder:
        if (self.path is None) == (self.config is None):
            raise ValueError("give path (a folder or hub id) or config (settings of a small encoder), one of the two")
        return self


def _named(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Named = Annotated[Encoder | None, BeforeValidator(_named, json_schema_input_type=str | Encoder | None)]


class Encoders(Section):
    """extract.encoders: which encoder makes the features of a modality; a path may stand alone."""

    image: Named = None
    """Of images and of the frames of videos; default: the base model's vision tower and projector."""
    audio: Named = None
    """Of sounds; default: the base model's audio tower and projector."""
    text: Named = None
    """Of texts; default: the base model's last hidden states."""
    behaviour: Named = None
    """Of histories of items; a folder that extract wrote, or settings; there is no default."""

    @model_validator(mode="after")
    def _no_small_text_encoder(self) -> Encoders:
        if self.text is not None and self.text.config is not None:
            raise ValueError("text has no small encoder to build: give a path, or leave it out for the base model")
        return self


class SearchIndex(Section):
    """extract.index: the search index over the pooled vectors."""

    kind: Literal["none", "exact", "flat", "hnsw", "ivf"] = "exact"
    """exact needs nothing and suits pools up to some 100,000; flat, hnsw and ivf are FAISS's (mmtune[retrieval]), of
    which hnsw and ivf are approximate and say their recall."""
    metric: Literal["cosine", "inner_product", "l2"] = "cosine"
    """How vectors are compared."""


class Reduction(Section):
    """extract.reduce: pooled vectors as shorter ones, in the column `reduced`; index and exemplars then use them."""

    method: Literal["pca", "autoencoder"] = "pca"
    """pca is the best linear code, exactly; autoencoder learns one, and can bend it (hidden). Both are fitted on the
    split train; the manifest says what share of the variance they lose on it and on other rows."""
    width: Annotated[int, Field(ge=1, le=65536)]
    """Numbers of a reduced vector; fewer than the pooled vector has and than training rows span."""
    of: tuple[FeatureKind | Literal["joint"], ...] = ()
    """Only these of what has features, such as [image, joint]; left out: all."""
    hidden: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Width of one hidden layer each way of the autoencoder; left out: a linear one, at best as good as pca."""
    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps of 256 rows that the autoencoder is trained for."""

    @model_validator(mode="after")
    def _of_the_autoencoder(self) -> Reduction:
        extra = sorted({"hidden", "steps"} & self.model_fields_set)
        if self.method == "pca" and extra:
            raise ValueError(f"{extra[0]} goes with method: autoencoder")
        return self


class Extract(Section):
    """extract: sources to features/."""

    modalities: tuple[FeatureKind, ...] = ()
    """Only these of image, audio, video, text and behaviour; left out: all that the sources hold."""
    encoders: Encoders = Encoders()
    """Which encoder makes the features of each."""
    tokens: bool = True
    """Keep the features of every token, not only the pooled vector."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """What tokens are kept in; pooled vectors are always fp32."""
    video_frames: Annotated[int, Field(ge=1, le=768)] = 8
    """Frames sampled evenly from a video; each is a token with its time position."""
    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 32
    """What the encoder takes at once."""
    joint: tuple[FeatureKind, ...] = ()
    """Kinds that get one vector per row besides, in features/joint: [image, text] joins a row's picture and words, or
    a chart's picture and the table behind it, at equal weight; zeros stand for what a row lacks."""
    reduce: Reduction | None = None
    """Shorter vectors beside the pooled ones."""
    index: SearchIndex = SearchIndex()
    """The search index."""
    twins: dict[FeatureKind, Annotated[float, Field(gt=0, le=1)]] = {}
    """Kind to a least cosine, such as {image: 0.99}. What val or test show and train does not, but for something so
    near that it may be the same in another file, is counted, warned of and listed in twins.jsonl. Pooled vectors are
    compared; how near is near depends on the encoder, so the median of the nearest is told too."""
    workers: Workers = "auto"
    """Processes that decode; the output does not depend on their number."""

    @model_validator(mode="after")
    def _joint_of_what_is_there(self) -> Extract:
        if self.joint and len(set(self.joint)) < 2:
            raise ValueError("joint joins two kinds or more, such as [image, text]")
        for name, kinds in (("joint", self.joint), ("twins", self.twins)):
            lacking = [kind for kind in kinds if self.modalities and kind not in self.modalities]
            if lacking:
                raise ValueError(f"{name} asks for {lacking[0]}, which modalities leaves out")
        if self.reduce is not None and "joint" in self.reduce.of and not self.joint:
            raise ValueError("reduce.of asks for joint: say what is joined, such as `joint: [image, text]`")
        return self


def encoder_paths(extract: Any, resolve: Callable[[str], str]) -> Any:
    """Returns the section's values with the paths of its encoders resolved.

    Args:
        extract: What stands in the recipe, not checked yet.
        resolve: A path as written to an absolute one, or to a hub id.
    """
    if not isinstance(extract, dict) or not isinstance(extract.get("encoders"), dict):
        return extract
    found = {}
    for name, value in extract["encoders"].items():
        path = value.get("path") if isinstance(value, dict) else value
        if isinstance(path, str) and path != BASE:
            value = {**value, "path": resolve(path)} if isinstance(value, dict) else resolve(path)
        found[name] = value
    return {**extract, "encoders": found}
