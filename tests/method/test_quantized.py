"""Layers in few bits: saved weights are in full precision, and bit-identical in layers that never trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from schedules import loss_of, setup
from tiny import tiny_llama
from torch import nn

from owlore_tune.errors import RunError
from owlore_tune.quantized import formats
from owlore_tune.quantized.formats import FORMATS, Int8Weight, NF4Weight, QuantizedWeight, format_of
from owlore_tune.quantized.linear import quantizable_outside, quantize, restore, weight_of
from owlore_tune.trainer import quantize_layers
from owlore_tune.training import validation
from runs import (
    after_step,
    assert_weights,
    changed,
    checkpoints,
    finetune,
    finetune_until,
    other_model,
    poison,
    prepare,
    read_weights,
    unbroken_weights,
    variant,
    weights,
)

KINDS = {"int8": ("int8", "full"), "int8 products": ("int8", "int8"), "nf4": ("nf4", "full")}


def quantized_config(config: dict, kind: str, name: str = "quantized", **changes) -> dict:
    weights_kind, products = KINDS[kind]
    return variant(config, name, owlore__weights=weights_kind, owlore__products=products, **changes)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("nf4", 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_format_is_near_the_weight_and_small(kind, most, dtype):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = FORMATS[kind].quantize(weight)
    back = stored.dequantize(dtype)
    assert back.dtype == dtype and back.shape == stored.shape == weight.shape
    assert torch.linalg.vector_norm((back - weight).float()) < most * torch.linalg.vector_norm(weight.float())
    assert torch.equal(stored.dequantize(dtype, slice(5, 9)), back[5:9])
    assert stored.nbytes <= weight.numel() * (1.04 if kind == "int8" else 0.54)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_that_train_as_they_are_are_drawn_while_a_loss_exists(kind, tokens, tmp_path):
    """The graph of the loss holds their parameters."""
    model, drawn = tiny_llama(), set()
    layers, optimizer, schedule = setup(model, rank=None, every=1)
    layers.quantized = quantize_layers(model, kind, tmp_path / "quantized")
    for _ in range(6):
        drawn.add(tuple(schedule.begin_step()))
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(drawn) > 1 and loss.isfinite()


def test_zeros_and_widths_that_blocks_do_not_divide():
    assert not Int8Weight.quantize(torch.zeros(4, 8)).dequantize(torch.float32).any()
    assert not NF4Weight.quantize(torch.zeros(4, 64)).dequantize(torch.float32).any()
    assert format_of(torch.Size([4, 48]), "nf4") is Int8Weight


@pytest.mark.parametrize("sizes", [(5, 1, 8), (5, 8, 1), (1, 8, 8), (0, 8, 8), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_linear_takes_every_size(sizes, kind):
    """Regression: torch's 8-bit product of one input feature was wrong, and an empty input raised."""
    rows, n, m = sizes
    torch.manual_seed(0)
    linear = nn.Linear(n, m)
    x = torch.randn(rows, n, requires_grad=True)
    quantize(linear, *KINDS[kind])
    product = linear(x)
    (got,) = torch.autograd.grad(product.sum(), x)
    stored = weight_of(linear).dequantize(torch.float32)
    torch.testing.assert_close(product, x @ stored.T + linear.bias, atol=0.05, rtol=0)
    torch.testing.assert_close(got, stored.sum(0).expand(rows, n), atol=0.05, rtol=0)


def test_products_are_in_full_precision_where_8_bit_ones_overflow(monkeypatch):
    """A CPU without VNNI instructions adds pairs of products in 16 bits. Values near the largest show it on any CPU."""
    torch.manual_seed(0)
    weight = Int8Weight.quantize(torch.ones(8, 64))
    x = torch.full((4, 64), 2.0)
    expected = x @ weight.dequantize(torch.float32).T
    torch.testing.assert_close(weight.linear(x, "int8"), expected, rtol=1e-5, atol=0)
    monkeypatch.setattr("owlore_tune.quantized.formats.CPU_IS_EXACT", False)
    assert torch.equal(weight.linear(x, "int8"), weight.linear(x, "full"))


@pytest.mark.parametrize("sizes", [(128, 96), (2112, 2112)], ids=["whole", "pieces"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_linear_is_the_linear_of_its_dequantized_weight(kind, sizes):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes)
    parameter, weight = linear.weight, linear.weight.detach().clone()
    x = torch.randn(2, 7, sizes[0], requires_grad=True)
    quantize(linear, *KINDS[kind])
    assert linear.weight is parameter and parameter.numel() == 0
    product = linear(x)
    gradient = torch.randn_like(product)
    (got,) = torch.autograd.grad(product, x, gradient)
    stored = weight_of(linear).dequantize(torch.float32)
    tolerance = 0.02 if kind == "int8 products" else 1e-6
    for ours, expected in ((product, x @ stored.T + linear.bias), (got, gradient @ stored)):
        assert torch.linalg.vector_norm(ours - expected) < tolerance * torch.linalg.vector_norm(expected)
    restore(linear, weight)
    assert linear.weight is parameter and torch.equal(linear(x), nn.functional.linear(x, weight, linear.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_never_trained_are_saved_bit_for_bit(kind, tiny_config, tiny_dir):
    config = quantized_config(tiny_config, kind, dataset_val=None)
    recipe, (checkpoint,) = finetune(config), checkpoints(config)
    layers, outside = changed(tiny_dir, checkpoint)
    assert layers == sorted({layer for draw in recipe.report.records.draws for layer in draw["active"]})
    assert outside == []
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights(config).values())


@pytest.mark.parametrize("score", ["outlier", "reverse", "weight_norm", "heavy_tail", "increase"])
def test_scores_equal_those_of_the_whole_model(score, tiny_config):
    plain = prepare(variant(tiny_config, "plain", owlore__score=score))
    quantized = prepare(quantized_config(tiny_config, "nf4", owlore__score=score))
    assert quantized.scores.scores == plain.scores.scores


@pytest.mark.parametrize(("kind", "state"), [(kind, "drop") for kind in KINDS] + [("nf4", "keep"), ("int8", "offload")])
def test_a_resumed_run_equals_the_unbroken_one(kind, state, tiny_config):
    config = quantized_config(tiny_config, kind, owlore__inactive_state=state, epochs=2, dataset_val=None)
    broken = variant(config, "broken", save_every_n_steps=3, keep_last_n=1)
    finetune_until(broken, 4)
    finetune_until(broken | {"resume_from_checkpoint": True}, 17)
    finetune(broken | {"resume_from_checkpoint": True})
    assert_weights(broken, unbroken_weights(config))


def test_a_layer_that_returned_in_a_skipped_step_is_corrected_after_a_resume(tiny_config, tmp_path):
    changes = {"owlore__inactive_state": "keep", "owlore__resample_every": 1, "epochs": 2, "dataset_val": None}
    config = quantized_config(tiny_config, "nf4", "unbroken", save_every_n_steps=1, keep_last_n=100, **changes)
    config = wide(config, tmp_path)
    recipe = prepare(config)
    poison(recipe, {9})
    recipe.train()
    assert recipe.progress.skipped_steps == 1
    again = variant(config, "again", resume_from_checkpoint=f"{config['output_dir']}/step_10")
    finetune(again)
    assert_weights(again, weights(config))


LOSSES = ("owlore_tune.loss.LinearCrossEntropyLoss", "torchtune.modules.loss.CEWithChunkedOutputLoss")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_whole_weights_and_the_plan_that_of_quantized_ones(kind, loss, tiny_config, monkeypatch):
    """The loss before training, and that after it, which is the loss of the saved weights."""
    monkeypatch.setattr(validation, "held_out_bytes_at_once", lambda *args: 1)  # every batch reads the weights
    config = quantized_config(tiny_config, kind, loss={"_component_": loss})
    recipe, whole = finetune(config), finetune(variant(tiny_config, "whole", max_steps_per_epoch=1))
    losses, measured, plan = recipe.report.records.losses, recipe.report.measure_memory(), recipe.plan
    assert losses["before"] == pytest.approx(whole.report.records.losses["before"], abs=1e-6)
    saved = variant(tiny_config, "saved", max_steps_per_epoch=1)
    saved["checkpointer"]["checkpoint_dir"] = str(checkpoints(config)[-1])
    assert finetune(saved).report.records.losses["before"] == pytest.approx(losses["after"], abs=1e-6)
    for category in ("weights", "projected", "bases"):
        assert measured[category] == getattr(plan, category) > 0
    assert plan.weights < 0.5 * whole.plan.weights  # in float32


def test_a_gpu_measures_the_loss_of_more_tokens_at_once():
    """Batches with their masks and hidden states take a quarter of the free memory, if that is more than on a CPU."""
    found = [validation.held_out_bytes_at_once(512, free) for free in (None, 10**6, 4 * 10**9)]
    assert found == [2**15 * 512, 2**15 * 512, 10**9]
    rows = [
        {key: torch.zeros(1, 64, dtype=torch.int64) for key in ("tokens", "labels", "sample_number")} for _ in "1234"
    ]
    groups = validation._groups(rows, -100, torch.device("cpu"), of_token=10, num_bytes=2 * (512 + 64 * 64 + 64 * 10))
    assert [len(batches) for batches, _ in groups] == [2, 2]


def test_a_gpu_quantizes_a_weight_of_a_7b_model_at_once():
    """A CPU quantizes a few rows at a time, to save memory."""
    rows = [formats.rows_at_once(4096, torch.device(device)) for device in ("cuda", "cpu")]
    assert rows[0] >= 4096 and rows[1] == 256


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_equals_that_with_rounded_weights_in_full_precision(kind, tiny_config, monkeypatch):
    """Bit for bit: a run whose weights are in full precision on the device, but rounded to the format's values."""
    config = quantized_config(tiny_config, kind, dataset_val=None)
    expected = unbroken_weights(config)

    def product(weight, x, products):
        return nn.functional.linear(x, weight.dequantize(x.dtype))

    for kind_of_weight in (QuantizedWeight, Int8Weight):
        monkeypatch.setattr(kind_of_weight, "linear", product)
    finetune(config)
    assert_weights(config, expected)


def wide(config: dict, tmp_path: Path) -> dict:
    """``config`` with a model whose weights NF4's blocks divide."""
    return other_model(config, tmp_path / "wide", num_kv_heads=4, embed_dim=64, intermediate_dim=128)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_are_those_before_and_the_updates(kind, tiny_config, tmp_path):
    """Layers that train are quantized. Saved weights are W₀ + A Pᵀ with W₀ in full precision, rounded once."""
    config = wide(quantized_config(tiny_config, kind, dataset_val=None, owlore__resample_every=50), tmp_path)
    recipe = finetune(config)
    before, saved = read_weights(Path(config["checkpointer"]["checkpoint_dir"])), weights(config)
    number = 0
    for name, weight in recipe.layers.active_weights():
        assert weight.linear.weight.numel() == 0
        _, index, part = name.split(".", 2)
        key = f"model.layers.{index}.mlp.down_proj.weight"
        if part == "mlp.w2.weight":
            update = 2**0.5 * weight.trained.detach().double() @ weight.basis.double().T
            torch.testing.assert_close(saved[key], (before[key].double() + update).float(), atol=1e-8, rtol=2e-7)
            assert update.abs().max() > 1e-4
            number += 1
    assert number == 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"update_gap": 2}, {"inactive_state": "keep", "resample_every": 1}, {"side": "shape", "update_gap": 2}],
    ids=str,
)
def test_a_weight_in_nf4_is_exact_within_its_basis(changes, tiny_config, tmp_path):
    """Also after a refresh, and in a layer that returns with its old basis: (Q(W₀) + correction Pᵀ) P = W₀ P."""
    changes = {f"owlore__{key}": value for key, value in changes.items()}
    config = wide(quantized_config(tiny_config, "nf4", dataset_val=None, **changes), tmp_path)
    recipe = finetune(config)
    store = recipe.quantized.store
    for name, weight in recipe.layers.active_weights():
        whole, stored = store.read(int(name.split(".")[1]))[name], weight_of(weight.linear).dequantize(torch.float32)
        error, low = (
            each @ weight.basis if weight.right else weight.basis.T @ each for each in (whole - stored, whole)
        )
        assert torch.linalg.vector_norm(error) > 0.05 * torch.linalg.vector_norm(low)
        torch.testing.assert_close(weight.correction.float(), error, atol=1e-6, rtol=0.01)


def test_accumulation_checkpointing_and_all_kinds_of_state(tiny_config):
    config = quantized_config(
        tiny_config, "nf4", "all", batch_size=2, gradient_accumulation_steps=2, enable_activation_checkpointing=True,
        owlore__inactive_state="keep", owlore__train_embeddings=True, owlore__train_output=True,
        owlore__train_norm=True, dtype="bf16",
    )  # fmt: skip
    recipe = finetune(config)
    assert recipe.report.records.losses["after"] < recipe.report.records.losses["before"]
    start = Path(config["checkpointer"]["checkpoint_dir"])
    outside = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert changed(start, checkpoints(config)[-1])[1] == outside


def test_only_the_named_files_are_read(tiny_config, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "model")
    other = {name: torch.zeros_like(w) for name, w in load_file(tiny_dir / "model.safetensors").items()}
    save_file(other, tmp_path / "model" / "z_ema.safetensors")
    config = quantized_config(tiny_config, "nf4", dataset_val=None)
    config["checkpointer"] |= {"checkpoint_dir": str(tmp_path / "model"), "checkpoint_files": ["model.safetensors"]}
    finetune(config)
    assert all(weight.any() for weight in weights(config).values())


def test_weights_that_are_not_finite_are_not_kept(tiny_config):
    config = quantized_config(tiny_config, "int8", dataset_val=None, save_every_n_steps=2)
    recipe = prepare(config)

    @torch.no_grad()
    def spoil():
        for name, weight in recipe.layers.active_weights():
            if "mlp.w1" in name:
                weight.trained[0, 0] = float("inf")

    after_step(recipe, 3, spoil)  # the last before a draw
    with pytest.raises(RunError, match="weights are not finite: layers.*mlp.w1.weight; lower optimizer.lr"):
        recipe.train()
    recipe.cleanup()
    assert all(weight.isfinite().all() for weight in weights(config).values())


def test_a_disk_that_fills_up_at_a_draw_harms_no_checkpoint(tiny_config, monkeypatch):
    config = quantized_config(tiny_config, "int8", dataset_val=None, save_every_n_steps=3)
    recipe = prepare(config)
    write = recipe.quantized.store.write

    def full_disk(index, layer_weights):
        if recipe.progress.step == 6:
            raise OSError("No space left on device")
        return write(index, layer_weights)

    monkeypatch.setattr(recipe.quantized.store, "write", full_disk)
    with pytest.raises(RunError, match="No space left on device. The newest checkpoint is .*step_6: resume"):
        recipe.train()
    recipe.cleanup()
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(config))


def test_checkpoints_share_the_files_of_the_store_in_which_those_of_a_user_stay(tiny_config):
    """Layers that do not train, also those that never did, are not written or read again."""
    config = quantized_config(tiny_config, "nf4", dataset_val=None, save_every_n_steps=2)
    finetune_until(config, 3)
    (first,) = checkpoints(config)
    own = [file for file in first.glob("model-*.safetensors") if file.stat().st_nlink == 1]
    assert len(own) == config["owlore"]["num_active_layers"]
    (store,) = (Path(config["output_dir"]) / "weights").iterdir()
    (store / "layer_0.999.safetensors").write_text("of an interrupted process")
    (store / "notes.txt").write_text("mine")
    (store / "mine").mkdir()
    finetune(config | {"resume_from_checkpoint": True})
    assert (store / "notes.txt").read_text() == "mine" and (store / "mine").is_dir()
    assert not (store / "layer_0.999.safetensors").exists()
    files = [{file.stat().st_ino for file in each.glob("model-*.safetensors")} for each in checkpoints(config)[-2:]]
    assert len(files[0] & files[1]) >= 1 + 4 - 2 - 2  # the outside, and layers that trained in neither interval
    assert {file.stat().st_ino for file in store.glob("*.safetensors")} & files[1]


def test_a_disk_too_small_for_the_store_is_refused(tiny_config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match="weights/.* needs .* bytes for the full-precision weights, and only 1,000"):
        prepare(quantized_config(tiny_config, "int8"))
    assert not (Path(tiny_config["output_dir"]) / "run.json").exists()  # the same command can be repeated


def test_embeddings_that_are_more_than_a_table_are_not_quantized():
    class Scaled(torch.nn.Embedding):
        def forward(self, tokens):
            return 8 * super().forward(tokens)

    head = torch.nn.Linear(4, 9)
    for embeddings, found in ((torch.nn.Embedding(9, 4), 2), (Scaled(9, 4), 1)):
        modules = quantizable_outside(SimpleNamespace(tok_embeddings=embeddings, output=head))
        assert len(modules) == found and modules[-1] is head
