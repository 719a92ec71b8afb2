"""tokenize: the settings of tokenize."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmtune.recipe.section import Section, Workers


class Tokenize(Section):
    """tokenize: instructions/ to tokens/."""

    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in tokens, media included."""
    layout: Literal["tree", "rows"] = "tree"
    """tree shares one prefix among the questions of one medium; rows keeps them apart."""
    too_long: Literal["drop", "drop_turns", "shorten"] = "drop"
    """Over-long rows, once they have lost their exemplars: dropped and counted, or lose whole early turns, or the end
    of their context. Question and options are never cut; a training row whose answer would be cut away is dropped."""
    video_frames: Annotated[int, Field(ge=1, le=768)] = 8
    """Frames sampled evenly from a video."""
    min_image_pixels: Annotated[int, Field(ge=1)] | None = None
    """Lower pixel budget per image, for processors that resize by a budget."""
    max_image_pixels: Annotated[int, Field(ge=1)] | None = None
    """Upper pixel budget per image, for processors that resize by a budget."""
    workers: Workers = "auto"
    """Processes; the output does not depend on their number."""
