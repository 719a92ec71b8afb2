"""sources: what one raw dataset is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mmtune.recipe.section import Section, SplitName

# Names of `columns` that people look for beside it.
COLUMN_PATHS = ("sources[].columns.strip", "sources[].columns.delimiter", "sources[].columns.rows")

Value = str | int | float | bool


class Source(Section):
    """One raw dataset."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")]
    """Short name, the first part of every example id."""
    reader: str
    """vqa_v2, coco_captions, coco_instances, flickr30k, chartqa, llava, sharegpt, messages, alpaca, squad, conll,
    rt_polarity, tweeteval, t0, table, folder or hf."""
    split: SplitName = "train"
    """Where its rows go."""
    path: str | None = None
    """The file or folder of single-file readers; a hub id for hf."""
    questions: str | None = None
    """Questions file of vqa_v2."""
    annotations: str | None = None
    """Annotation file of vqa_v2, coco_captions, coco_instances."""
    images: str | None = None
    """Folder that image paths are relative to; default: the annotation file's folder."""
    audios: str | None = None
    """Folder that audio paths are relative to."""
    videos: str | None = None
    """Folder that video paths are relative to."""
    columns: dict[str, str | int | list[str | int]] = {}
    """Column map of table, folder and hf: our name to the file's column name or index, a template such as
    "images/{file}.png" or a fixed text such as "=yes|no". Names: question (text, instruction), context, answer (output,
    target), rationale, image, audio, video, references, options, behaviour, history, id, metadata, rows, delimiter,
    strip; of folder label and keep, regular expressions for its paths."""
    where: dict[str, Value | tuple[Value, ...]] = {}
    """Rows to read of alpaca, hf, llava, messages, sharegpt and table: a column's name to the value, or list of values,
    that it must hold, such as {fold: train}; all of them where several are named. The others are not counted."""
    tasks: tuple[str, ...] = ()
    """Keep only these tasks of a reader that makes several."""
    task: str | None = None
    """What its rows are, such as sentiment_analysis, named_entity_recognition, question_answering or dialogue;
    default: what the reader makes."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    subset: str | None = None
    """The split to read of a hub dataset (its own name for it)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows, chosen by a hash of the id so that a smaller limit is a subset of a larger one."""
    part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Rows of this part of 0 to 1 by a hash, such as [0, 0.9] and [0.9, 1]: splits of data that have none. Rows of the
    same media or context stay together."""
    template: str | None = None
    """Name of one template, of the pool or of the file in templates, instead of a draw per row."""
    templates: str | None = None
    """pool, first or a template file for this source; default: build.templates. In a pair of a file {soft: 8} are eight
    learned vectors at that place, which finetune trains by method prompt or beside lora."""
    verbalizer: dict[str, str | tuple[str, ...]] = {}
    """Label to its word or words: the first is taught, all count when eval.answer is rank."""

    @field_validator("part")
    @classmethod
    def _some_part(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("part is [low, high] with low below high")
        return value
