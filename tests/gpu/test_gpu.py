"""Training on a GPU: `make gpu` runs this, and everything that has a GPU path of its own, on a machine with one."""

from pathlib import Path

import pytest
import torch
from families import SIZES
from omegaconf import OmegaConf
from torchtune.models.llama2 import llama2
from transformers import AutoModelForCausalLM, MixtralConfig

from owlore_tune.config.load import load_config
from owlore_tune.layers.grouped import group_experts, has_grouped_product
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.loss import LinearCrossEntropyLoss, mean_loss, shift_labels
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.models.experts import split_experts
from owlore_tune.models.fused import fuse_parts
from owlore_tune.optim.weights import ProjectedWeight
from owlore_tune.quantized.linear import quantize
from owlore_tune.training.records import read_records
from runs import finetune, finetune_until, prepare, read_weights, variant, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FORMATS = {"full": "full", "int8": "int8", "nf4": "full"}  # with their products


@pytest.mark.parametrize("changes", [{}, {"enable_activation_checkpointing": True}, {"dataset__packed": True}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_run_trains_as_on_a_cpu(tiny_config, tiny_dir, name, dtype, changes):
    """Losses of every step and, in float32, weights that moved alike. The sketches of bases are others on a GPU."""
    changes = changes | {"dtype": dtype, "owlore__basis": "svd"}
    changes |= {"owlore__weights": name, "owlore__products": FORMATS[name]}
    runs, losses = [], []
    for device in ("cpu", "cuda"):
        config = variant(tiny_config, f"run_{len(runs)}", device=device, **changes)
        finetune(config)
        losses.append([step["loss"] for step in read_records(Path(config["output_dir"]) / "steps.jsonl")])
        runs.append(weights(config))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == "fp32" else 2e-2)
    if dtype == "bf16":
        return  # updates of weights are rounded at random
    start = read_weights(tiny_dir)
    assert len([key for key, weight in start.items() if not torch.equal(weight, runs[0][key])]) > 10
    for key, weight in start.items():
        distance = torch.linalg.vector_norm(runs[1][key] - runs[0][key])
        assert distance <= 0.1 * torch.linalg.vector_norm(runs[0][key] - weight), key


@pytest.mark.parametrize("name", FORMATS)
def test_the_host_does_not_wait_in_forward_and_backward(name):
    """With bases. CUDA itself reports waits, also those inside torch."""
    device = torch.device("cuda")
    with device:
        model = llama2(64, 2, 4, 2, 256, max_seq_len=64, intermediate_dim=512).bfloat16()
    fuse_parts(model, device)
    if name != "full":
        for layer in find_layers(model):
            for _, linear in find_linears(layer):
                quantize(linear, name, FORMATS[name])
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    layers = ProjectedLayers(model, rank=8)
    layers.activate([0, 1])
    tokens, positions = torch.randint(64, (2, 64)), torch.arange(32).repeat(2, 2)
    packed = {"tokens": tokens, "input_pos": positions, "sample_number": torch.arange(2).repeat_interleave(32)[None]}
    for mode in ("default", "error"):  # the first pass makes the bases
        torch.cuda.set_sync_debug_mode(mode)
        try:
            labels = shift_labels(tokens, loss_fn.ignore_index)
            mean_loss(model, loss_fn, packed, labels, device).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad.isfinite().all() for parameter in layers.trained().values())


@pytest.mark.parametrize("name", FORMATS)
def test_experts_compute_together_without_a_wait(name):
    """In the projected form, and as one after the other within the rounding of bf16. One gets no tokens."""
    device = torch.device("cuda")
    if not has_grouped_product(device, torch.bfloat16):
        pytest.skip("needs compute capability 9 or 10")
    sizes = SIZES | dict(hidden_size=64, intermediate_size=128, dtype="bfloat16")
    causal = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=4))
    split_experts(causal)
    experts = causal.model.layers[0].mlp.experts.to(device).requires_grad_(False)
    weights = []
    for _, linear in find_linears(experts):
        if name != "full":
            quantize(linear, name)
        weights.append(ProjectedWeight(linear, 8, generator=lambda device: None))
        weights[-1].engage()
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    shares = torch.rand(64, 2, device=device, dtype=torch.bfloat16)
    experts(x, torch.arange(128, device=device).view(64, 2) % 4, shares).sum().backward()  # makes the bases of all
    inputs = x, torch.randint(3, (64, 2), device=device), shares
    for weight in weights:
        torch.nn.init.normal_(weight.trained, std=0.1)
    results = []
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = experts(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *(weight.trained for weight in weights)])])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        group_experts(experts, device)
    for one, together in zip(*results, strict=True):
        assert (one - together).norm() <= 0.02 * one.norm()


def test_offloaded_state_goes_on_after_a_resume(tiny_config):
    """A fused optimizer has its step counters on the GPU, also those of layers that do not train at the resume."""
    changes = {"owlore__num_active_layers": 1, "owlore__resample_every": 1, "owlore__inactive_state": "offload"}
    changes |= {"device": "cuda", "optimizer__fused": True, "save_every_n_steps": 1, "epochs": 4}
    config = variant(tiny_config, "run", **changes)
    finetune_until(config, 6)
    recipe = finetune(config | {"resume_from_checkpoint": True})
    assert recipe.progress.step == recipe.inputs.data.num_steps > 16 and not recipe.progress.skipped_steps


def test_a_layer_is_written_as_it_was_and_read_ahead_into_pinned_memory(tiny_config):
    recipe = prepare(variant(tiny_config, "run", device="cuda", owlore__weights="nf4"))
    store = recipe.quantized.store
    weights = {name: weight.to("cuda", non_blocking=True) for name, weight in store.read(0).items()}
    expected = {name: weight.cpu() for name, weight in weights.items()}
    torch.cuda._sleep(10**9)  # copies wait for it
    store.use(0, store.write(0, weights))
    for weight in weights.values():
        weight.zero_()
    pending = store.read(0)
    store.finish()
    store.read_ahead([0])
    read = store.read(0)
    assert pending.keys() == read.keys() == expected.keys() and all(weight.is_pinned() for weight in read.values())
    for name, weight in expected.items():
        assert torch.equal(pending[name], weight) and torch.equal(read[name], weight)
    recipe.cleanup()


def test_a_run_takes_what_is_planned(smollm2_dir, tmp_path):
    overrides = ["dataset_val=null", "max_steps_per_epoch=3", "dataset.packed=true", "batch_size=2", "device=cuda"]
    config = load_config("smollm2/135M_owlore", [*overrides, f"output_dir={tmp_path / 'run'}"])
    recipe = finetune(OmegaConf.to_container(config, resolve=False))
    peak = max(step["peak_memory_gb"] for step in read_records(tmp_path / "run" / "steps.jsonl"))
    assert peak == pytest.approx(recipe.plan.total / 1e9, rel=0.05)
