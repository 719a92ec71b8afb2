"""Examples as a model is asked them: the prompt without its last answer, and the whole conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from mmtune.choice import chosen
from mmtune.encoding.fit import Fitted, fit
from mmtune.encoding.refused import Refused
from mmtune.encoding.render import EncodedRow, Renderer
from mmtune.evaluation import metrics_of
from mmtune.evaluation.comparison import ScoredRow
from mmtune.records import Example, Message, Reject


def answer_of(example: Example) -> str:
    """Returns the text of the last assistant turn, empty when the conversation ends otherwise."""
    last = example.messages[-1] if example.messages else None
    return last.text if last is not None and last.role == "assistant" else ""


def question_of(example: Example) -> str:
    """Returns the text of the last user turn."""
    return next((message.text for message in reversed(example.messages) if message.role == "user"), "")


def scored_row(example: Example, chosen: Sequence[str] | None) -> ScoredRow:
    """Returns what scoring needs of an example.

    Args:
        example: Without references of its own, its answer is the reference.
        chosen: Metrics that the recipe asks for, or None for each task's own.
    """
    target = answer_of(example)
    return ScoredRow(
        id=example.id,
        source=example.source,
        task=example.task,
        group=example.group or example.id,
        metrics=metrics_of(example.task, example.metric, chosen),
        references=example.references or ((target,) if target else ()),
        options=example.options,
        metadata=dict(example.metadata),
        template=example.template_id,
    )


class ChosenExamples:
    """The examples to evaluate, read when they are asked for by number.

    Args:
        batches: Arrow record batches with an ``id`` column.
        to_example: A row to an Example.
        limit: At most this many, see ``choice``.
    """

    def __init__(self, batches: Sequence[Any], to_example: Callable[[Any], Example], limit: int | None) -> None:
        self._batches, self._to_example = batches, to_example
        places = [(at, row) for at, batch in enumerate(batches) for row in range(batch.num_rows)]
        if limit is not None and limit < len(places):
            ids = (value for batch in batches for value in batch.column("id").to_pylist())
            places = [places[at] for at in chosen(ids, limit, "eval.limit")]
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, number: int) -> Example:
        """Returns one example."""
        at, row = self._places[number]
        return self._to_example(self._batches[at].slice(row, 1).to_pylist()[0])


def _no_ranks(example: Example) -> Sequence[int]:
    return ()


def no_context(example: Example) -> str:
    """Returns nothing: no part of a row may be cut."""
    return ""


class EvalRows:
    """The examples that a model can take, encoded when they are asked for.

    Args:
        count: Number of examples.
        example: Example number to Example.
        renderer: Encodes a conversation.
        max_length: Longest conversation in tokens, answer included, as in training.
        drop_turns: Let over-long conversations lose whole early turns.
        ranks: Example to the ranks of its exemplars; the farthest are left out where they do not fit.
        context: Example to what it says that may lose its end where the rest does not fit; empty for nothing.

    Attributes:
        kept: Numbers of the examples that fit, in order; rows below are numbered within it.
        prompt_sizes: Tokens of every kept prompt.
        row_sizes: Tokens of every kept conversation.
        rejects: The examples that do not fit.
        dropped: Exemplars that were left out, per kept row.
        shortened: Whether the context lost its end, per kept row.
    """

    def __init__(
        self,
        count: int,
        example: Callable[[int], Example],
        renderer: Renderer,
        *,
        max_length: int,
        drop_turns: bool = False,
        ranks: Callable[[Example], Sequence[int]] = _no_ranks,
        context: Callable[[Example], str] = no_context,
    ) -> None:
        self._example, self._renderer = example, renderer
        self._max_length, self._drop_turns, self._ranks, self._context = max_length, drop_turns, ranks, context
        self.kept: list[int] = []
        self.prompt_sizes: list[int] = []
        self.row_sizes: list[int] = []
        self.rejects: list[Reject] = []
        self.dropped: list[int] = []
        self.shortened: list[bool] = []
        self._count = count

    def examine(self) -> Iterator[Example | None]:
        """Encodes every example once; yields it when it is kept, else None."""
        for number in range(self._count):
            example = self._example(number)
            try:
                fitted = self._fit(example)
                prompt = self._renderer.encode(_prompt(fitted.messages), example.tools, add_generation_prompt=True)
            except Refused as refused:
                self.rejects.append(Reject(example.split, example.id, refused.reason, refused.detail))
                yield None
                continue
            self.kept.append(number)
            self.row_sizes.append(fitted.row.input_ids.size)
            self.prompt_sizes.append(prompt.input_ids.size)
            self.dropped.append(fitted.dropped)
            self.shortened.append(fitted.context is not None)
            yield example

    def for_model(self, model: Any) -> EvalRows:
        """Returns the same rows as a model is asked them: one without a soft prompt sees no place for it."""
        # torch comes with it: a finished report is found again without.
        from mmtune.models.soft_tokens import soft_tokens

        if soft_tokens(model) is not None:
            return self
        other = copy(self)
        other._renderer = self._renderer.without_soft_tokens()
        return other

    def example(self, row: int) -> Example:
        """Returns the example of a kept row, without the exemplars and the end of the context that do not fit."""
        example = self.whole(row)
        if not self.dropped[row] and not self.shortened[row]:
            return example
        fitted, ranks = self._fit(example), self._ranks(example)
        shown = example.exemplar_ids
        if self.dropped[row]:
            shown = tuple(name for name, rank in zip(shown, ranks, strict=True) if rank in fitted.ranks)
        return replace(example, messages=tuple(fitted.messages), exemplar_ids=shown)

    def whole(self, row: int) -> Example:
        """Returns the example of a kept row as it was given."""
        return self._example(self.kept[row])

    def changed(self, rows: Sequence[int], change: Callable[[int, Example], Example]) -> EvalRows:
        """Returns some kept rows as other examples, still to be examined.

        Args:
            rows: Numbers of kept rows.
            change: Row number and example to what is asked instead.
        """
        return EvalRows(
            len(rows),
            lambda number: change(rows[number], self.example(rows[number])),
            self._renderer,
            max_length=self._max_length,
            drop_turns=self._drop_turns,
            context=self._context,
        )

    def encode(self, messages: Sequence[Message], tools: str) -> EncodedRow:
        """Returns a conversation of one's own making, with labels."""
        return self._renderer.encode(messages, tools)

    def _fit(self, example: Example) -> Fitted:
        return fit(
            self._renderer,
            example.messages,
            example.tools,
            self._max_length,
            drop_turns=self._drop_turns,
            ranks=self._ranks(example),
            context=self._context(example),
        )

    def prompts(self, rows: Sequence[int]) -> list[EncodedRow]:
        """Returns the prompts of kept rows."""
        out = []
        for row in rows:
            example = self.example(row)
            messages = self._fit(example).messages
            out.append(self._renderer.encode(_prompt(messages), example.tools, add_generation_prompt=True))
        return out

    def conversations(self, rows: Sequence[int]) -> list[EncodedRow]:
        """Returns the whole conversations of kept rows, with labels."""
        return [self._fit(self.example(row)).row for row in rows]


def _prompt(messages: Sequence[Message]) -> Sequence[Message]:
    """Returns the conversation without the answer that the model is asked for."""
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages
