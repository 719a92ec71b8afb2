r"""Templates from a file: PromptSource's YAML, and FLAN's pairs in YAML or JSON.

``rotten_tomatoes.yaml`` of PromptSource::

    dataset: rotten_tomatoes
    templates:
      7a8ccb1c-6737-4863-b08a-61d4a2839204: !Template
        answer_choices: They didn't like it ||| They loved it
        jinja: '{{text}} How does the reviewer feel about the movie? ||| {{ answer_choices [label] }}'
        metadata: !TemplateMetadata {choices_in_prompt: false, original_task: true, ...}
        name: Reviewer Enjoyment

FLAN's pairs of input and target by task, as data::

    rte:
      - ["{premise}\n\nDoes this mean that \"{hypothesis}\"?\n\n{options_}", "{answer}"]
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmtune.errors import DataError
from mmtune.prompts.forms import Template

_MOST_BYTES = 4 << 20
_EXAMPLE = 'give a name its pairs, such as vqa: [["{question} In one word?", "{answer}"]], or PromptSource\'s YAML'
_ANSWER = {"answer", "target"}
_SOFT = re.compile(r"\s*[1-9][0-9]{0,2}")


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases, in which PromptSource's two tags are mappings."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a template file")
        return super().compose_node(parent, index)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def load_templates(path: Path) -> tuple[Template, ...]:
    """Returns the templates of a file in the file's order.

    Raises:
        DataError: The file is missing, is no template file, or holds no template (``bad_templates``).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check `templates`", "file_missing") from error
    if len(raw) > _MOST_BYTES:
        raise _bad(path, "is larger than 4 MiB")
    try:
        value = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(path, f"is no YAML or JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, Mapping):
        raise _bad(path, "holds no mapping")
    of_promptsource = isinstance(value.get("templates"), Mapping)
    found = tuple(_promptsource(path, value["templates"]) if of_promptsource else _flan(path, value))
    if not found:
        raise _bad(path, "holds no template")
    again = {one.id for one in found if sum(other.id == one.id for other in found) > 1}
    if again:
        raise _bad(path, f"names {sorted(again)[0]!r} twice")
    return found


def _promptsource(path: Path, templates: Mapping[str, Any]) -> Iterator[Template]:
    for key, value in templates.items():
        jinja = value.get("jinja") if isinstance(value, Mapping) else None
        if not isinstance(jinja, str):
            raise _bad(path, f"has no `jinja` text in {key!r}")
        if "|||" in jinja and "{{" not in jinja and "{%" not in jinja:
            raise _bad(path, f"teaches the same words for every row in {key!r}")
        facts = value.get("metadata") or {}
        yield Template(
            id=str(value.get("name") or key).strip(),
            prompt=jinja,
            answer="",
            answer_kind="label" if value.get("answer_choices") else "text",
            choices=str(value.get("answer_choices") or ""),
            options_shown=bool(facts.get("choices_in_prompt")),
            # A template that asks for something else than the data set's own task answers with it too.
            inverted=facts.get("original_task") is False,
            form="jinja",
            raw=True,
        )


def _flan(path: Path, tasks: Mapping[str, Any]) -> Iterator[Template]:
    for task, pairs in tasks.items():
        for at, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise _bad(path, f"has no pair of input and target at {task}[{at}]")
            prompt, answer = pair
            asked, answered = _names(path, prompt), _names(path, answer)
            if any(name == "soft" and more for _, name, more, _ in string.Formatter().parse(answer)):
                raise _bad(path, f"has soft tokens in the target of {task}[{at}]")
            if not answered:
                raise _bad(path, f"teaches the same words for every row at {task}[{at}]")
            if _ANSWER & asked & answered:
                raise _bad(path, f"says the answer in the question of {task}[{at}]")
            yield Template(
                id=f"{task}_{at}",
                prompt=prompt,
                answer=answer,
                answer_kind="label" if {"options", "options_"} & asked else "text",
                # FLAN turns a task around by giving its answer and asking for one of its inputs.
                inverted=bool(_ANSWER & asked),
                raw=True,
            )


def _names(path: Path, text: str) -> set[str]:
    try:
        found = [(name, more, turn) for _, name, more, turn in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise _bad(path, f"has a brace that does not fit in {text!r}: {error}") from error
    # {soft: 8} is no slot, see ``forms``.
    found = [one for one in found if not (one[0] == "soft" and _SOFT.fullmatch(one[1] or "") and not one[2])]
    odd = next((name for name, more, turn in found if not name.isidentifier() or more or turn), None)
    if odd is not None:
        raise _bad(path, f"has the slot {odd!r}, which is no plain name")
    return {name for name, _, _ in found}


def _bad(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}", _EXAMPLE, "bad_templates")
