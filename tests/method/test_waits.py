"""On a GPU, the host waits when it reads a value. Meta tensors have no values, so reading one is an error."""

from typing import ClassVar

import pytest
import torch
from torchtune.models.llama2 import llama2

from owlore_tune.distributed.fsdp import clip_grad_norm_
from owlore_tune.distributed.world import ALONE
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.loss import LinearCrossEntropyLoss, mean_loss, shift_labels
from owlore_tune.measure import Clock

META = torch.device("meta")


class Event:
    """A CUDA event of a device that has reached the first ``done`` of them."""

    made: ClassVar[list["Event"]] = []
    done = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.made.append(self)

    def query(self):
        return self.made.index(self) < Event.done

    def elapsed_time(self, end):
        assert end.query()
        return 1e3 * (self.made.index(end) - self.made.index(self))

    def synchronize(self):
        raise AssertionError("the host waits")


def test_a_clock_waits_for_no_event(monkeypatch):
    """A part that the device has not finished counts in a later read."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    for part in ("forward", "backward", "forward"):
        with clock(part):
            pass
    Event.done = 4
    assert clock.read() == {"forward": 1.0, "backward": 1.0}
    assert clock.read() == {}
    Event.done = 6
    assert clock.read() == {"forward": 1.0}


@pytest.mark.parametrize("basis", ["randomized", "svd"])
@pytest.mark.parametrize("side", ["right", "shape"])
def test_the_host_reads_no_value_in_forward_backward_and_refresh(side, basis):
    """Two steps of two micro-batches each, with new bases in every step, up to the norm of the gradients."""
    with META:
        model = llama2(64, 2, 4, 2, 64, max_seq_len=16, intermediate_dim=96)
    loss_fn = LinearCrossEntropyLoss(chunk_size=4)
    loss_fn.set_model_output(model)
    with META:
        layers = ProjectedLayers(model, rank=8, side=side, basis=basis)
    layers.activate([0, 1])
    for _ in range(2):
        for _ in range(2):
            tokens = torch.randint(64, (2, 12))
            labels = tokens.masked_fill(torch.rand(2, 12) < 0.5, loss_fn.ignore_index)
            loss = mean_loss(model, loss_fn, {"tokens": tokens}, shift_labels(labels, loss_fn.ignore_index), META)
            loss.backward()
        assert clip_grad_norm_(layers.trained().values(), 1.0, ALONE).device == META
        layers.merge()
