"""The instruction's embedding is a mean over its span; losses by task sum to the whole."""

import torch

from mmtune.models.objectives.instruction import instruction_embedding, task_losses


def test_the_embedding_is_the_mean_over_the_span():
    embeddings = torch.randn(2, 5, 4, requires_grad=True)
    span = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    made = instruction_embedding(embeddings, span)
    torch.testing.assert_close(made[0], embeddings[0, 1:3].mean(0))
    assert torch.equal(made[1], torch.zeros(4))
    made.square().sum().backward()
    assert embeddings.grad[~span].abs().max() == 0 and embeddings.grad[span].abs().min() > 0


def test_losses_by_task_sum_to_the_whole_with_its_gradient():
    loss = torch.rand(6, requires_grad=True)
    task = torch.tensor([0, 2, 2, 0, 2, 0])
    parts = task_losses(loss, task, ["vqa", "caption", "count"])
    assert list(parts) == ["vqa", "count"]
    torch.testing.assert_close(sum(parts.values()), loss.sum(), atol=1e-6, rtol=0)
    torch.testing.assert_close(parts["count"], loss[[1, 2, 4]].sum())
    (gradient,) = torch.autograd.grad(sum(parts.values()), loss)
    assert torch.equal(gradient, torch.ones(6))
