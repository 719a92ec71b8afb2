"""The instruction's embedding is the mean of what the user says, however rows come, and of nothing else."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import build_trees, tree_rows
from mmtune.encoding.trie import build_tries
from mmtune.evaluation.trie_batch import trie_batch
from mmtune.models.composite.template import PLAIN
from mmtune.models.composite.turns import user_turns_of
from mmtune.models.mask_rules import mask_rules
from mmtune.records import Message, TextPart
from mmtune.training.loss import answer_loss
from mmtune.training.tree_batch import TreeCollator
from tests.training.conftest import _composite, encoding_tests, tiny

ASKED = "What does the picture say?"


@pytest.fixture(scope="module")
def family() -> Any:
    """The processor with a hybrid model whose gate and resamplers read the instruction."""
    known = deepcopy(tiny("composite_perceiver"))
    torch.manual_seed(0)
    build = _composite("qformer", mode="hybrid", instruction=True)
    known.model = build(known.processor, known.processor.tokenizer).eval()
    known.model.config.projectors["image"]["instruction"] = True
    with torch.no_grad():
        # A fresh gate is moved by no instruction.
        known.model.model.gate.condition.weight.normal_()
    return known


def talk(*turns: str, system: str = "Be brief.", medium: Any = None) -> list[Message]:
    said = [Message("system", (TextPart(system),))] if system else []
    for number, text in enumerate(turns):
        shown = (medium,) if medium is not None and number == 0 else ()
        role = "assistant" if number % 2 else "user"
        said.append(Message(role, (*shown, TextPart(text))))
    return said


def mean_of(family: Any, text: str) -> torch.Tensor:
    ids = family.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return family.model.get_input_embeddings()(ids).mean(0)


@pytest.fixture
def read(family: Any) -> Any:
    """What gate and image resampler are given as the instruction, call by call."""
    found: dict[str, list[torch.Tensor]] = {"gate": [], "image": []}
    model = family.model.model
    hooks = [
        model.gate.register_forward_pre_hook(lambda gate, args: found["gate"].append(args[1])),
        model.multi_modal_projector.register_forward_pre_hook(lambda part, args: found["image"].append(args[2])),
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.fixture
def medium(media: Any, served: Any) -> Any:
    made, real = media.image(60, 44)
    served[made.path] = real["image"]
    return made


@pytest.fixture
def media() -> Any:
    return encoding_tests()._Media()


@pytest.fixture
def served(monkeypatch: Any) -> dict[str, Any]:
    store: dict[str, Any] = {}
    monkeypatch.setattr("mmtune.media.load.load_image", lambda root, medium: store[medium.path])
    return store


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-5)


def test_it_is_the_mean_of_the_users_words(family: Any, read: Any, medium: Any) -> None:
    collate = Collator(family.processor, media_root=Path())
    rows = [talk(ASKED, "four"), talk(ASKED, "four", system="", medium=medium), talk("Which one of them?", "this")]
    batch = collate([family.renderer.encode(row) for row in rows])
    with torch.no_grad():
        family.model(**batch)
    asked = batch["labels"] != -100
    for number, text in enumerate((ASKED, ASKED, "Which one of them?")):
        close(read["gate"][0][number][asked[number]], mean_of(family, text))
    close(read["image"][0], mean_of(family, ASKED))


def test_another_system_turn_leaves_it_the_same(family: Any, read: Any, medium: Any) -> None:
    collate = Collator(family.processor, media_root=Path())
    for system in ("Be brief.", "Answer in one word, and never in two of them."):
        with torch.no_grad():
            family.model(**collate([family.renderer.encode(talk(ASKED, "four", system=system, medium=medium))]))
    for one, other in read.values():
        torch.testing.assert_close(one[:, -1], other[:, -1], rtol=0, atol=1e-6)


def test_every_answer_has_its_own_turns_and_a_medium_its_turns(family: Any, read: Any, medium: Any) -> None:
    second = "And which are they?"
    row = family.renderer.encode(talk(ASKED, "four", second, "all", medium=medium))
    batch = Collator(family.processor, media_root=Path())([row])
    with torch.no_grad():
        family.model(**batch)
    bears = batch["labels"][0] != -100
    first = bears & ((~bears).cumsum(0) == (~bears).cumsum(0)[bears.nonzero()[0]])
    close(read["gate"][0][0][first], mean_of(family, ASKED))
    close(read["gate"][0][0][bears & ~first], mean_of(family, second))
    close(read["image"][0], mean_of(family, ASKED))


def test_branches_of_trees_and_tries_have_their_own(family: Any, read: Any, medium: Any) -> None:
    collate = Collator(family.processor, media_root=Path())
    questions = ("What is this?", "What is that?", "Why?")
    rows = [family.renderer.encode(talk(text, "four", medium=medium)) for text in questions]
    tree = next(build_trees(rows, list("abc"), 4096))
    assert (tree.branch == 0).sum() > 5
    with torch.no_grad():
        batch = TreeCollator(collate)([[tree]])
        answer_loss(family.model, batch, mask_rules(family.model))
    at = (batch["next_labels"][0] != -100).nonzero()[:, 0]
    for branch, text in enumerate(questions, start=1):
        own = at[batch["layout"][1][0][at] == branch]
        assert len(own)
        close(read["gate"][0][0][own], mean_of(family, text))
    tries = build_tries(tree_rows(tree), lambda total, size, common: True)
    turns = trie_batch(tries, collate, None)["user_turns"][0].numpy()
    for number, (path, _) in zip(tries[0].rows, tries[0].paths(), strict=True):
        assert np.array_equal(turns[path], collate.user_turns(rows[number].input_ids)[: path.size])


def test_a_processor_is_enough_to_generate(family: Any, read: Any) -> None:
    from PIL import Image

    texts = [
        family.processor.apply_chat_template(
            [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            ],
            add_generation_prompt=True,
        )
        for text in (ASKED, "Why?")
    ]
    family.processor.tokenizer.padding_side = "left"
    picture = Image.new("RGB", (60, 44), "red")
    batch = family.processor(images=[picture, picture], text=texts, padding=True, return_tensors="pt")
    assert int(batch["attention_mask"][1, 0]) == 0
    family.model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(read["gate"]) == 3
    for number, text in enumerate((ASKED, "Why?")):
        for step in read["gate"]:
            close(step[number, -1], mean_of(family, text))
        close(read["image"][0][number], mean_of(family, text))


def test_a_text_without_a_template_is_all_prompt(family: Any, read: Any) -> None:
    batch = family.processor(text=["Hello world"], return_tensors="pt")
    assert "user_turns" not in batch
    with torch.no_grad():
        family.model(**batch)
    close(read["gate"][0][0, -1], mean_of(family, "Hello world"))
    assert family.processor(text="Hello world")["input_ids"] and family.processor(text=[ASKED])["input_ids"]


HEADED = (
    "{{ bos_token }}{%- for m in messages -%}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}"
    "{%- for part in m.content -%}{{ part.text | trim }}{%- endfor -%}{{- '<|eot_id|>' -}}{%- endfor -%}"
)
ROLES = "{%- for m in messages -%}{{- m.role + ': ' + m.content[0].text + '\\n' -}}{%- endfor -%}"


@pytest.mark.parametrize(("template", "closing"), [(PLAIN, "<|im_end|>"), (HEADED, "<|eot_id|>"), (ROLES, None)])
def test_turns_of_any_template_with_control_tokens(repository: Any, template: str, closing: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(repository / "data" / "base")
    named = {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]}
    tokenizer.add_special_tokens(named, replace_extra_special_tokens=False)
    turns = user_turns_of(tokenizer, template)
    assert (turns and tokenizer.convert_ids_to_tokens(turns.closing)) == closing
    if turns is None:
        return
    said = [("system", "Be brief."), ("user", "\n1 <image>or two?"), ("assistant", "user"), ("user", " why")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    shown = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    ids = np.array(tokenizer(shown, add_special_tokens=False)["input_ids"])
    found = turns(ids)
    assert [tokenizer.decode(ids[found == k]).strip() for k in (1, 2)] == ["1 or two?", "why"]
    assert found[0] == 0 and found[-1] == -2 and sorted({*np.abs(found)}) == [0, 1, 2]
    image = ids == tokenizer.convert_tokens_to_ids("<image>")
    assert found[image].tolist() == [-1]
    # What a token is depends on nothing behind it.
    for size in range(ids.size):
        assert np.array_equal(turns(ids[:size]), found[:size])
