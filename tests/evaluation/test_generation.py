"""Batched greedy answers and losses equal those of one row at a time."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional

from mmtune.encoding.render import EncodedRow
from mmtune.evaluation.generation import Stopped, answer_losses, batches, generate_texts, stop_ids

PAD, END = 0, 1


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    found = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # Larger weights, so that greedy choices differ from row to row.
        for parameter in found.parameters():
            parameter.mul_(4.0)
    return found


class Tokenizer:
    def __init__(self):
        self.eos_token_id = END
        self.added_tokens_decoder = {PAD: "<pad>", END: "<end>", 2: "<turn>"}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        return " ".join(str(value) for value in ids if value > 2) + " "


def encoded(ids, answer=0) -> EncodedRow:
    ids = np.asarray(ids, dtype=np.int32)
    labels = np.full_like(ids, -100)
    if answer:
        labels[-answer:] = ids[-answer:]
    return EncodedRow(ids, labels, ())


def collate(rows, left):
    longest = max(row.input_ids.size for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for at, row in enumerate(rows):
        size = row.input_ids.size
        place = slice(longest - size, None) if left else slice(0, size)
        ids[at, place], labels[at, place] = torch.tensor(row.input_ids).long(), torch.tensor(row.labels).long()
        mask[at, place] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(3)
    return [encoded(generator.integers(3, 40, size=size), answer=size // 3) for size in (9, 4, 15, 6, 12, 3, 8)]


def generate(model, rows, batch_rows, **more):
    return generate_texts(
        model,
        Tokenizer(),
        lambda chosen: [rows[at] for at in chosen],
        lambda some: collate(some, left=True),
        sizes=[row.input_ids.size for row in rows],
        stops=more.pop("stops", [END]),
        pad_id=PAD,
        max_new_tokens=6,
        batch_rows=batch_rows,
        **more,
    )


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_stand_as_near_to_a_short_row_as_to_a_long_one(model, rows, kind):
    torch.manual_seed(1)
    behind = get_peft_model(copy.deepcopy(model), kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    for parameter in behind.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    found = []
    for batch_rows in (1, 4):
        peaks = []
        # Of one batch after the other; the end is never said, so that every row has as many.
        generate(behind, rows, batch_rows, stops=[], look=lambda own, peaks=peaks: peaks.extend(own))
        found.append(np.sort(peaks))
    np.testing.assert_allclose(*found, rtol=1e-5)


def losses(model, rows, batch_rows, **more):
    return answer_losses(
        model,
        lambda chosen: [rows[at] for at in chosen],
        lambda some: collate(some, left=False),
        sizes=[row.input_ids.size for row in rows],
        batch_rows=batch_rows,
        **more,
    )


def test_batches_hold_every_row_once_longest_first():
    found = list(batches([3, 9, 5, 9, 1], 2))
    assert found == [[1, 3], [2, 0], [4]]


def test_batched_answers_equal_answers_one_by_one(model, rows):
    done = []
    together = generate(model, rows, 4, advance=done.append)
    assert together == generate(model, rows, 1)
    assert len(set(together)) > 3 and sum(done) == len(rows)


def test_an_answer_ends_at_any_stop_id(model, rows):
    free = generate(model, rows, 3, stops=[])
    stop = int(free[0].split()[1])
    stopped = generate(model, rows, 3, stops=[END, stop])
    for before, after in zip(free, stopped, strict=True):
        ids = before.split()
        assert after.split() == (ids[: ids.index(str(stop))] if str(stop) in ids else ids)


def test_losses_equal_cross_entropy_over_all_logits(model, rows):
    nll, tokens = losses(model, rows, 3)
    for at, row in enumerate(rows):
        ids = torch.tensor(row.input_ids).long()[None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        wanted = torch.tensor(row.labels).long()[1:]
        expected = functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
        assert nll[at] == pytest.approx(float(expected.detach()), rel=1e-4)
        assert tokens[at] == int((wanted != -100).sum())


def test_losses_do_not_need_a_model_that_takes_positions(model, rows):
    def forward(input_ids, attention_mask, use_cache):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    plain = SimpleNamespace(forward=forward, parameters=model.parameters, dtype=model.dtype)

    class Plain:
        def __getattr__(self, name):
            return getattr(plain, name)

        def __call__(self, **inputs):
            return forward(**inputs)

    assert losses(Plain(), rows, 3)[0] == pytest.approx(losses(model, rows, 3)[0])


def test_a_stop_is_obeyed_between_batches(model, rows):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 1

    with pytest.raises(Stopped):
        generate(model, rows, 2, should_stop=stop)
    with pytest.raises(Stopped):
        losses(model, rows, 2, should_stop=lambda: True)


def test_stop_ids_come_from_model_tokenizer_and_trained_answers():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 8]))
    assert stop_ids(model, Tokenizer(), [encoded([5, 6, 2], 1), encoded([5, 6], 1)]) == [END, 2, 7, 8]
