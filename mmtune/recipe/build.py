"""build: the settings of build-data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmtune.recipe.exemplars import BuildExemplars
from mmtune.recipe.mixture import Mixture
from mmtune.recipe.section import Section, Workers

TEMPLATE_DRAWS = ("pool", "first")
"""Values of ``templates`` that name no file."""


class Build(Section):
    """build-data: raw sources to instructions/."""

    templates: str = "pool"
    """pool draws a template per row from the task's pool; first always takes the first; or a file of templates
    (PromptSource's YAML, or FLAN's pairs in YAML or JSON), which says all that is said: name {context} where a row has
    one."""
    mixture: Mixture | None = None
    """How sources are mixed; absent: every training row once, zero-shot."""
    exemplars: BuildExemplars | None = None
    """Solved rows before every training row, and how they are chosen; absent: none, but for mixture.shots."""
    content_free: str = ""
    """Stands for a text without content, such as N/A: rows with options keep what it gives, and eval.answer: rank
    divides by its scores (contextual calibration, arXiv:2102.09690)."""
    prompt: str | None = None
    """A prompt.json of `mmtune prompt`, of another run_dir: its instruction, exemplars and label words ask every row
    that is not inverted."""
    system: str = ""
    """System turn put before every question; empty for none."""
    media: Literal["pointer", "embed"] = "pointer"
    """pointer keeps paths; embed stores the bytes, for moving a dataset elsewhere."""
    verify: Literal["decode", "header"] = "decode"
    """decode reads each distinct medium whole once, header trusts its header."""
    hash_media: bool = False
    """Store the sha256 of every medium."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 89_000_000
    """Larger images are refused from their header."""
    max_audio_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longer sounds are refused."""
    max_video_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longer videos are refused."""
    max_drop_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fail (exit 3) when a larger share of rows is refused."""
    dedup: Literal["error", "first"] = "error"
    """What to do with a second row of the same id."""
    workers: Workers = "auto"
    """Processes; the output does not depend on their number."""

    @model_validator(mode="after")
    def _one_number_of_exemplars(self) -> Build:
        if self.mixture and self.mixture.shots and self.exemplars and "k" in self.exemplars.model_fields_set:
            raise ValueError("mixture.shots says how many exemplars a row shows: leave exemplars.k out")
        if self.mixture and self.mixture.delimiters and not (self.shots or self.prompt):
            raise ValueError(
                "mixture.delimiters part exemplars, and no row shows any: give mixture.shots, or leave it out"
            )
        return self

    @property
    def shots(self) -> dict[int, float]:
        """Number of exemplars to the share of training rows that show so many."""
        if self.mixture is not None and self.mixture.shots:
            return dict(self.mixture.shots)
        return {} if self.exemplars is None else {self.exemplars.k: 1.0}
