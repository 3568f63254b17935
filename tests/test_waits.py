"""On a GPU, the host waits when it reads a value. Meta tensors have no values, so reading one is an error."""

import pytest
import torch
from torchtune.models.llama2 import llama2

from owlore_tune.layers.active import ActiveLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.loss import LinearCrossEntropyLoss, mean_loss, shift_labels
from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups

META = torch.device("meta")


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize("bits", [32, 8])
def test_the_host_reads_no_value_in_forward_backward_and_refresh(bits, moments, monkeypatch):
    """Two steps of two micro-batches each, with a basis refresh in every step, up to the norm of the gradients."""
    with META:
        model = llama2(64, 2, 4, 2, 64, max_seq_len=16, intermediate_dim=96)
    loss_fn = LinearCrossEntropyLoss(chunk_size=4)
    loss_fn.set_model_output(model)
    optimizer = OwLoreAdamW(
        parameter_groups(model), rank=8, update_gap=1, moments=moments, state_bits=bits, basis_bits=bits
    )
    monkeypatch.setattr(optimizer, "_generator", lambda *args: None)  # there are none on the meta device
    active = ActiveLayers(model, optimizer, LayerSampler([1.0, 1.0], num_active=2), resample_every=10)
    active.maybe_redraw(0)
    for _ in range(2):
        for _ in range(2):
            tokens = torch.randint(64, (2, 12))
            labels = tokens.masked_fill(torch.rand(2, 12) < 0.5, loss_fn.ignore_index)
            loss = mean_loss(model, loss_fn, {"tokens": tokens}, shift_labels(labels, loss_fn.ignore_index), META)
            loss.backward()
        assert optimizer.clip_grad_norm_(1.0).device == META
        for parameter in optimizer._refreshed:  # as a step would
            optimizer.state[parameter]["basis_age"] = 1
