import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from torchtune.models.llama3_2 import llama3_2

from owlore_tune.loss import LinearCrossEntropyLoss, shift_labels


def tied_llama():
    torch.manual_seed(0)
    return llama3_2(64, 2, 4, 2, 32, 64, intermediate_dim=48)


@pytest.mark.parametrize("build", [tiny_llama, tied_llama])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(build, frozen_head, tokens):
    labels = torch.where(torch.rand(tokens.shape) < 0.4, torch.tensor(-100), tokens.roll(-1, 1))
    expected_model, model = build(), build()
    for m in (expected_model, model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(not (frozen_head and name.startswith(("output", "tok_embeddings"))))
    expected = F.cross_entropy(expected_model(tokens).flatten(0, 1), labels.flatten())
    (2 * expected).backward()
    loss_fn = LinearCrossEntropyLoss(chunk_size=5)
    loss_fn.set_model_output(model)
    loss = loss_fn(model(tokens), labels)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), other in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(("chunk_size", "expected"), [(256, [256, 64]), (50, [50] * 6 + [32])])
def test_a_16_bit_head_on_a_cpu_gets_few_numbers_of_rows(chunk_size, expected):
    """torch compiles 16-bit products for every number of rows, and keeps them."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, 310, 32), torch.randint(64, (1, 310))
    losses, gradients = [], []
    for dtype, rows in ((torch.bfloat16, expected), (torch.float32, None)):
        model, seen = tiny_llama(dtype=dtype), []
        model.output.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        loss_fn = LinearCrossEntropyLoss(chunk_size)
        loss_fn.set_model_output(model)
        leaf = hidden.to(dtype).requires_grad_()
        loss = loss_fn(leaf, labels)
        loss.backward()
        assert seen == rows if rows else sum(seen) == 310
        losses.append(loss.item())
        gradients.append(leaf.grad.float())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_whole_chunks_are_not_sliced(tokens):
    """Regression: the backward of a slice of all rows filled and copied a tensor as large as the logits."""
    model = tiny_llama()
    loss_fn = LinearCrossEntropyLoss(chunk_size=tokens.numel() // 2)
    loss_fn.set_model_output(model)
    hidden = model(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss_fn(hidden, tokens)
    names = {event.key for event in seen.key_averages()}
    assert "aten::_log_softmax_backward_data" in names and "aten::slice_backward" not in names


def test_no_gradients_are_made_in_validation(tokens, monkeypatch):
    """Also if the head is trained."""
    model = tiny_llama()
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: calls.append(args) or grad(*args))
    with torch.no_grad():
        loss_fn(model(tokens), tokens)
    assert not calls
    loss_fn(model(tokens), tokens)
    assert calls


def test_names_of_the_models_parameters_do_not_change():
    model = tiny_llama()
    before = list(model.state_dict())
    LinearCrossEntropyLoss().set_model_output(model)
    assert list(model.state_dict()) == before


def test_labels_are_those_of_the_next_token():
    labels = torch.tensor([[-100, 5, 6, -100], [1, 2, 3, 4]])
    assert shift_labels(labels, -100).tolist() == [[5, 6, -100, -100], [2, 3, 4, -100]]


def test_misuse_is_refused(tokens):
    with pytest.raises(ValueError, match="chunk_size=0"):
        LinearCrossEntropyLoss(chunk_size=0)
    with pytest.raises(RuntimeError, match="set_model_output"):
        LinearCrossEntropyLoss()(torch.zeros(1, 2, 3), torch.zeros(1, 2))
