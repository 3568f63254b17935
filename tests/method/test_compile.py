"""Compiled layers: torch compiles each kind of layer once, and no draw compiles another."""

from collections import Counter

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.backends.registry import register_backend
from torchtune.models.llama2 import llama2

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.models.fused import fuse_parts
from owlore_tune.quantized import formats
from owlore_tune.quantized.linear import quantize
from owlore_tune.training.components import RECOMPILE_LIMIT, compile_parts
from runs import other_model, prepare, variant

KINDS: Counter = Counter()


@register_backend(name="counting")
def counting(graph: torch.fx.GraphModule, inputs: list):
    """Counts graphs by what differs between layers: whether gradients are wanted, and of which inputs and weights."""
    wanted = tuple(value.requires_grad for value in inputs if isinstance(value, torch.Tensor))
    KINDS[torch.is_grad_enabled(), wanted] += 1
    return aot_eager(graph, inputs)


@pytest.mark.parametrize("weights", ["full", "int8", "nf4"])
@pytest.mark.parametrize("num_layers", [2, 5])
def test_all_layers_share_one_graph_in_the_form_that_they_have_on_a_gpu(weights, num_layers, monkeypatch):
    """Regression: fused norms and quantized Linears were compiled anew for each layer, and 32 graphs ended the run.
    Products of quantized weights in several pieces broke graphs."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "counting")
    monkeypatch.setattr(formats, "_PIECE", 64 * 64)
    torch._dynamo.reset()
    KINDS.clear()
    torch.manual_seed(0)
    model = llama2(64, num_layers, 4, 2, 64, max_seq_len=64, intermediate_dim=192)
    layers = ProjectedLayers(model, rank=8)
    fuse_parts(model, torch.device("cuda"))
    if weights != "full":
        for _, linear in find_linears(find_layers(model)):
            quantize(linear, weights)
    tokens = torch.randint(64, (2, 8))
    model.tok_embeddings.requires_grad_(True)

    def gradient():
        return torch.autograd.grad(model(tokens).square().mean(), model.tok_embeddings.weight)[0]

    expected = gradient()
    compile_parts(LinearCrossEntropyLoss(), model, layers)
    torch.testing.assert_close(gradient(), expected)
    assert KINDS.total() == 1


SLOW = pytest.mark.slow
FORMATS = {
    "full": {},
    "int8": {"owlore__weights": "int8", "owlore__products": "int8"},
    "nf4": {"owlore__weights": "nf4"},
}


@pytest.mark.parametrize(
    ("weights", "checkpointing"),
    [
        ("full", False),
        pytest.param("full", True, marks=SLOW),
        pytest.param("int8", False, marks=SLOW),
        pytest.param("nf4", False, marks=SLOW),
    ],
)
def test_30_draws_with_rows_of_any_length_compile_each_kind_of_layer_once(
    weights, checkpointing, tiny_config, tmp_path, monkeypatch
):
    """Also with weight decay, whose product changes in every step, and with refreshes between draws."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "counting")
    torch._dynamo.reset()
    KINDS.clear()
    config = variant(
        tiny_config, "compiled", compile=True, owlore__resample_every=1, run_val_every_n_steps=2, epochs=3,
        enable_activation_checkpointing=checkpointing, optimizer__weight_decay=0.1, **FORMATS[weights],
    )  # fmt: skip
    config = other_model(config, tmp_path / "wide", num_kv_heads=4, embed_dim=64, intermediate_dim=128)
    recipe, totals = prepare(config), []
    report = recipe.report.step
    recipe.report.step = lambda *args, **kwargs: (totals.append(KINDS.total()), report(*args, **kwargs))
    recipe.train()
    recipe.cleanup()
    assert len({tuple(draw["active"]) for draw in recipe.report.records.draws}) == 6  # all pairs of 4 layers
    assert len(totals) == 30 and totals[12] == totals[-1] >= KINDS.total() - 1  # one for the last full loss
    # Trained, with decay and without, or frozen; in validation, above a layer that trains, and above none. The first
    # ones are compiled anew when a second length makes torch compile for any.
    assert KINDS.total() <= 20 < RECOMPILE_LIMIT
