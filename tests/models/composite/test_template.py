"""Chat templates of language models that know nothing of media, or of pictures alone, show them all the same."""

import json

import pytest
from transformers import AutoTokenizer

from mmtune.errors import RecipeError
from mmtune.models.composite.template import PLAIN, template_of

TOKENS = {"image": "<image>", "audio": "<audio>"}
STRINGS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m.content | trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "Which {one}?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
]


@pytest.fixture
def tokenizer(repository):
    found = AutoTokenizer.from_pretrained(repository / "data" / "base")
    found.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]}, replace_extra_special_tokens=False)
    return found


def shown(tokenizer):
    template = template_of(tokenizer, TOKENS)
    return tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False, add_generation_prompt=True)


def test_every_medium_is_shown_in_its_place(tokenizer):
    wanted = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image><audio>Which {one}?<|im_end|>\n"
        "<|im_start|>assistant\nthis<|im_end|>\n<|im_start|>assistant\n"
    )
    # The bundled base's template knows pictures, the next one strings alone, the last knows all.
    for template in (tokenizer.chat_template, STRINGS, PLAIN):
        tokenizer.chat_template = template
        assert shown(tokenizer) == wanted, template
    assert template_of(tokenizer, TOKENS) == PLAIN
    tokenizer.chat_template = None
    assert template_of(tokenizer, TOKENS) == PLAIN


def test_a_text_with_tools_goes_through_as_it_is(tokenizer, repository):
    tools = [{"type": "function", "function": {"name": "look"}}]
    alone = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    asked = {"tokenize": False, "tools": tools}
    given = tokenizer.apply_chat_template(alone, **asked)
    assert json.dumps("look") in given
    assert tokenizer.apply_chat_template(alone, chat_template=template_of(tokenizer, TOKENS), **asked) == given


def test_a_template_without_a_users_text_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(RecipeError, match="shows no text and media"):
        template_of(tokenizer, TOKENS)
