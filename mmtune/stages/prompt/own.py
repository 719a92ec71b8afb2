"""What one method alone is told: the words of rl, its writer, the subspace of bbt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmtune.prompts.search import Solved
from mmtune.recipe import Prompt, Writer
from mmtune.stages.prompt.rows import answer_of, solved

if TYPE_CHECKING:
    from mmtune.stages.prompt.course import Course

_SHOWN = 5
"""Solved rows that a writer is shown."""
_LONGEST = 300
"""Characters of each."""


def method_name(settings: Prompt) -> str:
    """Returns the name of the method among ``METHODS``."""
    return "rl_lm" if settings.method == "rl" and settings.rl.policy == "lm" else settings.method


def own_settings(course: Course, asker: Any) -> Any:
    """Returns the settings of the course's method, or None where it has none.

    Args:
        course: The search.
        asker: Its model and processor say which words there are.
    """
    name, settings = method_name(course.settings), course.settings
    if name == "rl":
        from mmtune.stages.prompt.words import rl_settings

        rows = (*course.rows.dev, *course.rows.pool)
        answers = {text for one in rows for text in (*one.options, *one.references, answer_of(one))}
        return rl_settings(settings.rl, asker.processor, asker.model, answers)
    if name == "rl_lm":
        assert settings.rl.writer is not None
        return _writer(settings.rl.writer, [solved(one) for one in course.rows.pool], course.offline)
    if name == "bbt":
        from mmtune.stages.prompt.soft import bbt_settings

        return bbt_settings(settings.bbt)
    return None


def _writer(own: Writer, rows: list[Solved], offline: bool) -> Any:
    from mmtune.encoding.processor import load_processor, tokenizer_of
    from mmtune.models.load import load_model
    from mmtune.prompts.search.grpo import GrpoSettings

    def load() -> tuple[Any, Any]:
        tokenizer = tokenizer_of(load_processor(own.model, offline=offline))
        return load_model(own.model, offline=offline), tokenizer

    return GrpoSettings(
        load=load,
        request=own.request or request_for(rows),
        max_tokens=own.max_tokens,
        rate=own.learning_rate,
        lora_r=own.lora_r,
    )


def request_for(rows: list[Solved]) -> str:
    """Returns what a writer is asked for: one instruction for a task of which it sees some solved rows."""
    shown = "\n".join(f"Input: {one.asked[:_LONGEST]}\nOutput: {one.answer[:_LONGEST]}" for one in rows[:_SHOWN])
    return (
        f"Here are inputs of a task and the right outputs.\n{shown}\n"
        "Write one short instruction that makes a model give the right output. Answer with the instruction alone."
    )
