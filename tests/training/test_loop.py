"""The loop: its loss is transformers' own, split as one likes; what trains must move, what ruins is refused."""

import copy
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtune.errors import DivergedError, IntegrityError, ResourceError
from mmtune.models.adapter import add_lora, train_fully
from mmtune.training.guards import Spikes
from mmtune.training.loop import answer_loss
from mmtune.training.moved import TowerWatch

sys.path.insert(0, str(Path(__file__).parent))
from course import Rows, run, tiny_model

TEXT_ONLY = frozenset()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected, rel=1e-5):
    """A gradient that is nought but for rounding, as that of a bias of keys, is held to the largest one."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3 * largest)
        assert (found[name] - value).abs().max() <= rel * scale, name


def test_the_loss_is_that_of_transformers():
    model, batch = tiny_model(), Rows().batch(range(6))
    nll, count = answer_loss(model, batch)
    theirs = model(**batch).loss
    assert count == sum(Rows().targets(row) for row in range(6))
    assert nll.item() / count == pytest.approx(theirs.item(), rel=1e-6)
    (nll / count).backward()
    ours = gradients(model)
    model.zero_grad()
    theirs.backward()
    close(ours, gradients(model))


@pytest.mark.parametrize(("batch_rows", "accumulate"), [(2, 6), (3, 4), (6, 2)])
def test_micro_batches_of_unequal_targets_are_one_big_batch(batch_rows, accumulate):
    """Answers have one to three tokens, so a mean of means would be off."""
    found = []
    for split in ({"batch_rows": 12}, {"batch_rows": batch_rows, "accumulate": accumulate}):
        model = tiny_model()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        found.append((run(model, Rows(), optimizer=plain, rate=0.1, steps=3, **split).losses, model.state_dict()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, value in found[0][1].items():
        assert torch.allclose(found[1][1][name], value, rtol=1e-5, atol=1e-6), name


def test_activation_checkpointing_changes_nothing():
    plain = add_lora(tiny_model(), towers=["llm", "vision"], targets=None, r=2, alpha=4)
    inner = tiny_model()
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner.enable_input_require_grads()
    saving = add_lora(inner, towers=["llm", "vision"], targets=None, r=2, alpha=4)
    saving.load_state_dict(plain.state_dict())
    batch, found = Rows().batch(range(4)), []
    for model in (plain, saving):
        model.train()
        nll, _ = answer_loss(model, batch)
        nll.backward()
        found.append((nll.item(), gradients(model)))
    assert inner.is_gradient_checkpointing
    # Without checkpointing the last block runs for label tokens alone.
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    close(found[1][1], found[0][1], rel=1e-5)


def test_bf16_stays_near_fp32_and_weights_stay_in_fp32():
    exact, rough = train_fully(tiny_model(), ["llm"]), train_fully(tiny_model(), ["llm"])
    expected = run(exact, Rows(), steps=6)
    found = run(rough, Rows(), steps=6, precision="bf16")
    assert found.losses != expected.losses
    assert found.losses == pytest.approx(expected.losses, rel=0.05)
    assert {p.dtype for p in rough.parameters()} == {torch.float32}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_the_plan(workers):
    rows = Rows()
    result = run(tiny_model(), rows, steps=5, batch_rows=3, workers=workers)
    expected = [int(row) for step in result.plan.steps() for trees in step for row in trees]
    assert workers or rows.seen == expected
    assert result.losses == run(tiny_model(), Rows(), steps=5, batch_rows=3).losses


def test_an_error_while_a_batch_is_made_comes_out():
    class Broken(Rows):
        def batch(self, rows, step=None):
            if 5 in rows:
                raise IntegrityError("the file changed")
            return super().batch(rows)

    with pytest.raises(IntegrityError, match="the file changed"):
        run(tiny_model(), Broken(), steps=3)


# What trains must move, what is frozen must not.


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("towers", [["llm"], ["vision", "llm"], ["vision", "projector"]])
def test_an_honest_run_has_its_verdict_after_one_step(method, towers):
    model = tiny_model()
    tuned = (
        train_fully(model, towers) if method == "full" else add_lora(model, towers=towers, targets=None, r=2, alpha=4)
    )
    assert run(tuned, Rows(), steps=1).outcome.unseen == set()


def test_a_trained_tower_that_gets_no_gradient_is_an_error():
    model = train_fully(tiny_model(), ["vision", "llm"])
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: (given[0].detach(),))
    with pytest.raises(IntegrityError, match="the vision tower should train") as caught:
        run(model, Rows(), steps=2)
    assert caught.value.exit_code == 7


def test_a_trained_tower_that_the_optimizer_forgot_is_an_error():
    model = train_fully(tiny_model(), ["vision", "llm"])
    known = [p for name, p in model.named_parameters() if p.requires_grad and "vision" not in name]
    with pytest.raises(IntegrityError, match="the vision tower should train"):
        run(model, Rows(), optimizer=torch.optim.AdamW(known, lr=0.01))


def test_a_frozen_parameter_that_moves_is_an_error():
    model = train_fully(tiny_model(), ["llm"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    frozen = model.model.multi_modal_projector.linear_1.weight

    def also_move(*_):
        with torch.no_grad():
            frozen.add_(1e-3)

    optimizer.register_step_post_hook(also_move)
    with pytest.raises(IntegrityError, match=r"frozen parameter .*linear_1\.weight moved"):
        run(model, Rows(), optimizer=optimizer)


def test_text_only_steps_postpone_the_verdict_on_a_tower():
    seen_late = Rows(pictures=frozenset(range(12)))
    first = {int(row) for trees in next(run(tiny_model(), Rows(), steps=1).plan.steps()) for row in trees}
    seen_late.pictures = seen_late.pictures - first
    assert run(train_fully(tiny_model(), ["vision", "llm"]), seen_late, steps=3).outcome.unseen == set()
    broken = train_fully(tiny_model(), ["vision", "llm"])
    broken.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: (given[0].detach(),))
    with pytest.raises(IntegrityError, match="vision"):
        run(broken, seen_late, steps=3)
    never = run(train_fully(tiny_model(), ["vision", "llm"]), Rows(pictures=TEXT_ONLY), steps=2)
    assert never.outcome.unseen == {"vision"}


def test_a_tower_alone_passes_over_rows_without_its_media():
    model = train_fully(tiny_model(), ["vision"])
    result = run(model, Rows(pictures=frozenset({0, 1, 2})), steps=6, batch_rows=1)
    assert result.outcome.unseen == set() and len(result.losses) == 6


def test_a_rate_of_zero_postpones_the_verdict():
    model = train_fully(tiny_model(), ["llm"])
    watch = TowerWatch(model)
    watch.check(model, rate=0.0, targets=3, modalities=())
    assert watch.waiting == {"llm"}
    # One step is forgiven: a gate that starts shut lets nothing through in the first.
    watch.check(model, rate=0.1, targets=3, modalities=())
    with pytest.raises(IntegrityError, match="the llm tower"):
        watch.check(model, rate=0.1, targets=3, modalities=())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    watch.check(model, rate=0.1, targets=3, modalities=())
    assert watch.waiting == set()


# A signal during validation saves at the step before it, and the loss is not lost.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("at", "eval_every"), [(2, 2), (4, None)], ids=["within", "at the end"])
def test_a_signal_during_validation_saves_and_a_resumed_run_validates_first(at, eval_every, number):
    from mmtune.training.signals import Stopped

    def stopped(stopping):
        signal.raise_signal(number)
        assert stopping()
        raise Stopped

    model, asked = tiny_model(), {"eval_every": eval_every, "steps": 4}
    broken = run(model, Rows(), validate=stopped, **asked)
    assert (broken.outcome.step, broken.outcome.stopped_by, broken.saved) == (at, number, [at])
    assert "val_loss" not in broken.texts[at]
    values = iter([0.5, 0.25])
    resumed = run(
        model,
        Rows(),
        validate=lambda stopping: next(values),
        start=at,
        metrics=broken.texts[at],
        optimizer=broken.optimizer,
        **asked,
    )
    unbroken = run(tiny_model(), Rows(), validate=lambda stopping: 0.0, **asked)
    found, wanted = ([json.loads(line) for line in each.outcome.metrics.splitlines()] for each in (resumed, unbroken))
    assert [(row["step"], row["loss"], list(row)) for row in found] == [
        (row["step"], row["loss"], list(row)) for row in wanted
    ]
    assert [row["val_loss"] for row in found if "val_loss" in row] == ([0.5, 0.25] if eval_every else [0.5])
    assert not resumed.outcome.stopped_by


def test_a_line_of_metrics_speaks_of_all_its_steps_after_a_resume():
    whole = run(tiny_model(), Rows(), log_every=4)
    sums = run(tiny_model(), Rows(), log_every=4, save_every=3).sums[3]
    assert sums["targets"] > 0
    model = tiny_model()
    first = run(model, Rows(), log_every=10, steps=3)
    resumed = run(model, Rows(), log_every=4, start=3, optimizer=first.optimizer, sums=sums)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)


def test_rows_per_second_are_of_steps_alone(monkeypatch):
    from mmtune.training import meter

    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])

    class Timed(Rows):
        def batch(self, rows, step=None):
            if step == 0:
                # The clock may run only where the loop waits for it: every batch is made in the first second.
                now[0] = 1.0
            return super().batch(rows, step)

    def pause(stopping):
        now[0] += 100.0
        return 0.5

    result = run(tiny_model(), Timed(), steps=4, eval_every=1, log_every=4, validate=pause)
    (row,) = [json.loads(line) for line in result.outcome.metrics.splitlines() if "loss" in json.loads(line)]
    assert row["rows_per_second"] == pytest.approx(16.0)


def test_a_resumed_run_notices_the_spike_that_the_unbroken_one_does():
    def broken(start):
        model, passes = train_fully(tiny_model(), ["llm"]), []

        def jump(module, given):
            passes.append(1)
            return (given[0] * (40.0 if len(passes) > 29 else 1.0),)

        model.lm_head.register_forward_pre_hook(jump)
        first = run(model, Rows(), steps=start, rate=1e-3, save_every=start)
        more = {"start": start, "optimizer": first.optimizer, "sums": first.sums[start]}
        return run(model, Rows(), steps=31, rate=1e-3, **more).notes

    late, early = broken(26), broken(5)
    assert late and late == early and "around" in late[0]


# What would ruin the weights is refused.


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate 2 GiB", "not enough memory: you tried 9 bytes"]
)
def test_memory_that_runs_out_names_the_examples_and_the_setting(said):
    model = tiny_model()

    def fail(module, given):
        raise RuntimeError(said)

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ResourceError) as caught:
        run(model, Rows())
    assert "row-" in caught.value.message and "batch_tokens" in caught.value.hint
    assert caught.value.exit_code == 5 and "\n" not in caught.value.message


def test_a_non_finite_loss_stops_before_the_optimizer_with_ids_and_checkpoint():
    plan = run(tiny_model(), Rows(), steps=3, batch_rows=2, accumulate=2).plan
    third = [[int(row) for row in trees] for trees in list(plan.steps())[2]]
    culprit, beside = third[1]
    model, until = tiny_model(), tiny_model()
    with pytest.raises(DivergedError) as caught:
        run(model, Rows(spoilt=frozenset({culprit})), steps=3, batch_rows=2, accumulate=2, save_every=1)
    assert caught.value.exit_code == 6
    text = caught.value.message
    assert "the loss of step 3" in text and f"row-{culprit}" in text and "last good checkpoint: step 2" in text
    # Only the micro batch that was not finite is named.
    assert all(f"row-{row}" not in text.replace(f"row-{culprit}", "").replace(f"row-{beside}", "") for row in third[0])
    run(until, Rows(), steps=2, batch_rows=2, accumulate=2)
    for (name, found), expected in zip(model.named_parameters(), until.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_non_finite_gradient_stops_too():
    model = tiny_model()
    before = copy.deepcopy(model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * np.inf)
    with pytest.raises(DivergedError, match=r"the gradient of step 1 is not finite.*row-.*none yet"):
        run(model, Rows())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_jump_of_the_loss_is_a_warning_once():
    spikes = Spikes()
    quiet = [2.0 - 0.02 * step + 0.05 * (-1) ** step for step in range(40)]
    assert not any(spikes.over(loss) for loss in quiet)
    assert spikes.over(4.0) == pytest.approx(1.3, abs=0.3)
    assert not any(spikes.over(loss) for loss in [1.2, 1.25, 1.15] * 3)
    # A lasting rise is the new normal after a while.
    lasting = [spikes.over(5.0) is not None for _ in range(60)]
    assert lasting[0] and not lasting[-1]


def test_the_loop_names_the_examples_of_a_jump():
    model = train_fully(tiny_model(), ["llm"])
    rows = Rows()

    def jump(module, given):
        return (given[0] * (40.0 if len(rows.seen) >= 4 * 30 else 1.0),)

    model.lm_head.register_forward_pre_hook(jump)
    result = run(model, rows, steps=34, rate=1e-3)
    assert result.notes and "row-" in result.notes[0]
