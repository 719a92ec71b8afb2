"""The chat template of a composite model: the language model's own, which may know nothing of media."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtune.errors import RecipeError

PLAIN = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type in ('image', 'audio', 'behaviour') -%}{{- '<' + part.type + '>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""For a language model that has none."""
# Put before a template, it hands that messages of strings, with tokens in place of media.
_AS_STRINGS = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string or not message.content -%}{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}{%- set line = namespace(text='') -%}{%- for part in message.content -%}{%- if part is string -%}"
    "{%- set line.text = line.text + part -%}{%- elif part.type in ('image', 'audio', 'behaviour') -%}"
    "{%- set line.text = line.text + '<' + part.type + '>' -%}{%- elif part.text is defined -%}"
    "{%- set line.text = line.text + part.text -%}{%- endif -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=line.text)] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = flat.messages -%}\n"
)


def template_of(tokenizer: Any, tokens: Mapping[str, str]) -> str:
    """Returns a chat template that shows every medium.

    It is the tokenizer's own where that does, else its own over messages in which media are tokens in the text.

    Args:
        tokenizer: Of the language model.
        tokens: What stands for a medium, by modality.

    Raises:
        RecipeError: The tokenizer's template shows no user's text.
    """
    own = getattr(tokenizer, "chat_template", None)
    if not isinstance(own, str):
        return PLAIN
    for template in (own, _AS_STRINGS + own):
        if _shows(tokenizer, template, tokens):
            return template
    raise RecipeError(
        "the chat template of the language model shows no text and media of a user",
        "give its tokenizer a chat template, or leave it without one",
        "template_shows_no_media",
    )


def _shows(tokenizer: Any, template: str, tokens: Mapping[str, str]) -> bool:
    from jinja2 import TemplateError

    said = "Which one is it"
    parts = [*({"type": name} for name in tokens), {"type": "text", "text": said}]
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], chat_template=template, tokenize=False
        )
    except (TemplateError, TypeError, ValueError, AttributeError):
        # A template for strings meets a list.
        return False
    return "{'" not in shown and all(shown.count(text) == 1 for text in (said, *tokens.values()))
