"""The memory plan against measured memory, and the memory limit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from forks import Command
from live_bytes import LiveBytes
from omegaconf import OmegaConf
from places import refused
from tiny import tiny_llama
from torchtune import training
from torchtune.modules.loss import CEWithChunkedOutputLoss

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune import cli
from owlore_tune.config.load import override
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.errors import ConfigError
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.memory import plan as memory_plan
from owlore_tune.memory.peers import peer_plans
from owlore_tune.memory.plan import CATEGORIES, MemoryPlan, Method, plan_memory
from owlore_tune.memory.step import StepShape, _fused_as_on
from owlore_tune.models.hf import hf_decoder
from owlore_tune.training.components import build_trained_model
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.plan import (
    FREE_SHARE,
    plan_run,
    plans_of_config,
    savings,
    seq_len_to_plan,
)
from runs import recipe_of

CPU = torch.device("cpu")
SHAPE = StepShape(batch_size=4, seq_len=32)


def plan(
    shape=SHAPE, num_active=2, dtype=torch.float32, others=False, loss_fn=None, model=None, **options
) -> MemoryPlan:
    model = model or tiny_llama(dtype=dtype).to("meta")
    loss_fn = loss_fn or LinearCrossEntropyLoss()
    if hasattr(loss_fn, "set_model_output"):
        loss_fn.set_model_output(model)
    else:
        model.set_num_output_chunks(loss_fn.num_output_chunks)
    outside = dict.fromkeys(("train_embeddings", "train_output", "train_norm"), others)
    return plan_memory(model, loss_fn, Method({"rank": 8} | options | outside, num_active, 8.0), shape, device=CPU)


def assert_as_real(planned: MemoryPlan, model, shape: StepShape) -> None:
    """Compare the plan of a step that trains all layers with an independent count of ``model`` with data."""
    loss_fn = LinearCrossEntropyLoss()
    model.requires_grad_(False).layers.requires_grad_(True)
    loss_fn.set_model_output(model)
    if shape.checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={type(model.layers[0])})
    with LiveBytes(model) as real:
        tokens = torch.zeros(shape.batch_size, shape.seq_len, dtype=torch.long)
        loss_fn(model(tokens), tokens).backward()
    counted = planned.gradients + planned.activations + planned.logits + planned.temporary
    assert counted == pytest.approx(real.most, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_data_holds_what_a_real_one_holds(checkpointing):
    shape = StepShape(batch_size=4, seq_len=32, checkpointing=checkpointing)
    assert_as_real(plan(shape, num_active=4, rank=None), tiny_llama(), shape)


LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "starcoder2", "attention_dropout": 0.1}, {"model_type": "minicpm3", **LATENT}],
    ids=lambda fields: fields["model_type"],
)
def test_attention_that_a_cpu_cannot_fuse_is_planned(fields):
    """With dropout, and with values of another width than keys."""
    fields = fields | dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    fields |= dict(num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    with torch.device("meta"):
        empty = hf_decoder(**fields)
    shape, loss_fn = StepShape(batch_size=1, seq_len=256), LinearCrossEntropyLoss()
    planned = plan(shape, num_active=3, rank=None, model=empty, loss_fn=loss_fn)
    assert_as_real(planned, hf_decoder(**fields), shape)
    method = Method({"rank": None}, 3, 8.0)
    on_gpu = plan_memory(empty, loss_fn, method, shape, device=torch.device("cuda"), framework=0)
    assert on_gpu.activations < planned.activations


def test_a_held_out_loss_needs_embeddings_and_head_in_full_precision():
    """On a CPU, with quantized weights. On a GPU, the plan is for training alone."""
    shape = StepShape(batch_size=1, seq_len=8, weights="int8")
    model = tiny_llama(vocab_size=4000).to("meta")
    outside = model.tok_embeddings.weight.nbytes + model.output.weight.nbytes
    layer = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    without, planned = (plan(replace(shape, validates=validates), model=model) for validates in (False, True))
    freed = planned.gradients + planned.activations + planned.logits + planned.temporary
    assert without.merging == 0 < planned.merging == outside + layer - freed
    method = Method({"rank": 8}, 2, 8.0)
    on_gpu = [
        plan_memory(model, LinearCrossEntropyLoss(), method, replace(shape, validates=v), device=torch.device("cuda"))
        for v in (False, True)
    ]
    assert on_gpu[0] == on_gpu[1]


def test_bytes_that_are_known_exactly():
    planned = plan(num_active=2, others=True)
    model = tiny_llama()
    rope = model.layers[0].attn.pos_embeddings
    assert planned.weights == sum(p.nbytes for p in model.parameters()) + rope.theta.nbytes + rope.cache.nbytes
    # Two LLaMA layers of width 32, key and value width 16, MLP width 48; two norms each.
    low = (32 + 16 + 16 + 32 + 48 + 32 + 48) * 8
    full = 2 * 32
    outside = 64 * 32 * 2 + 32
    assert planned.moments == 2 * 4 * (2 * (low + full) + outside)
    assert planned.projected == 4 * 2 * low
    assert planned.bases == 4 * 2 * 8 * (32 * 6 + 48)


def test_settings_move_the_plan_the_right_way():
    wide = StepShape(batch_size=16, seq_len=64)
    usual = plan(wide, num_active=2)
    assert plan(StepShape(16, 64, checkpointing=True), num_active=2).activations < 0.5 * usual.activations
    assert plan(wide, num_active=4).moments == 2 * usual.moments
    assert plan(wide, num_active=None).moments == 2 * usual.moments
    assert plan(StepShape(8, 64), num_active=2).activations == pytest.approx(usual.activations / 2, rel=0.02)
    assert plan(wide, dtype=torch.bfloat16).moments == usual.moments
    held = [
        plan(wide, loss_fn=loss_fn, model=tiny_llama(vocab_size=4000).to("meta"))
        for loss_fn in (LinearCrossEntropyLoss(), CEWithChunkedOutputLoss())
    ]
    chunk, everything = (step.activations + step.logits for step in held)
    assert everything > chunk + 0.9 * 16 * 64 * 4000 * 4  # all logits, in float32
    accumulated = plan(StepShape(16, 64, accumulates=True), num_active=2, rank=None)
    assert accumulated.gradients > plan(wide, num_active=2, rank=None).gradients


def test_peers_cost_what_sets_them_apart():
    model, loss_fn = tiny_llama().to("meta"), LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    options = dict(device=CPU, rank=8, framework=0, lora_rank=2)
    everything = dict.fromkeys(("train_embeddings", "train_output", "train_norm"), True)
    full, lora, galore, lisa = dict(peer_plans(model, loss_fn, SHAPE, train_outside=everything, **options)).values()
    assert full.moments == 2 * sum(p.nbytes for p in model.parameters())
    assert lora.moments < galore.moments < full.moments
    assert lora.weights > full.weights  # adapters
    assert lisa.bases == 0 < galore.bases
    # Training the weights outside the layers adds exactly their moments.
    *_, frozen_galore, frozen_lisa = dict(peer_plans(model, loss_fn, SHAPE, train_outside={}, **options)).values()
    outside = 2 * 4 * (64 * 32 * 2 + 32)
    assert galore.moments - frozen_galore.moments == lisa.moments - frozen_lisa.moments == outside
    assert all(parameter.is_meta for parameter in model.parameters())


def test_experts_have_plans_of_all_methods_on_a_gpu():
    """There they are grouped, if they are Linears and not adapters."""
    with torch.device("meta"):
        model = hf_decoder(**FAMILIES["olmoe"][-1].to_dict())
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    options = dict(device=torch.device("cuda"), rank=8, framework=0, train_outside={})
    assert len(dict(peer_plans(model, loss_fn, SHAPE, **options))) == 4


def test_moments_of_16_bits_are_planned_for_what_trains_in_them(tiny_config):
    changes = {"dtype": "bf16", "owlore": tiny_config["owlore"] | {"rank": None, "train_embeddings": True}}
    settings = TrainingSettings.from_config(OmegaConf.create(tiny_config | changes))
    model = build_trained_model(settings).model
    active = [*model.layers[0].parameters(), *model.layers[3].parameters(), *model.tok_embeddings.parameters()]
    expected = sum(2 * p.numel() * (4 if p.ndim == 1 else 2) for p in active)
    assert plan_run(settings, 32).moments == pytest.approx(expected, rel=1e-4)  # with counters of steps


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["owlore", "full"])
def test_the_plan_is_what_smollm2_takes(method, smollm2_dir, tmp_path):
    command = [
        "tune", "run", "owlore_full_finetune", "--config", f"smollm2/135M_{method}", f"output_dir={tmp_path}",
        f"checkpointer.checkpoint_dir={smollm2_dir}", "dataset_val=null", "dataset.packed=true",
        "batch_size=2", "tokenizer.max_seq_len=512", "max_steps_per_epoch=2", "owlore.calibration_batches=1",
        "owlore.score=decrease", "owlore.resample_every=1", "device=cpu", "seed=5",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert any(0 in draw["active"] for draw in manifest["draws"])  # the draw with the highest memory
    planned, measured = manifest["memory_bytes"].values()
    assert measured["total"] == pytest.approx(planned["total"], rel=0.07)


def limited(config: dict, tmp_path, limit: float) -> str:
    """Return the message of a run under a limit in GB. Its weights cannot be read."""
    config = config | {"output_dir": str(tmp_path / "limited"), "batch_size": 40, "device_memory_limit": limit}
    with pytest.raises(ConfigError) as refused:
        recipe_of(config).setup()
    return str(refused.value)


def test_a_plan_over_the_limit_is_refused_before_weights_load(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(OwLoreFullFinetuneRecipe, "load_checkpoint", lambda self: pytest.fail("weights were loaded"))
    monkeypatch.setattr(memory_plan, "framework_bytes", lambda device: 10**8)  # the test process grows
    config = OmegaConf.create(tiny_config | {"batch_size": 40, "output_dir": str(tmp_path / "planned")})
    settings = TrainingSettings.from_config(config)
    planned = plan_run(settings, seq_len_to_plan(settings, None))
    message = limited(tiny_config, tmp_path, (planned.total - planned.activations / 4) / 1e9)
    assert "device_memory_limit=" in message and "it fits with batch_size=1 gradient_accumulation_steps=40" in message
    assert "or with enable_activation_checkpointing=true" in message and "AdamW8bit" not in message
    assert "none of the settings tried makes it fit" in limited(tiny_config, tmp_path, 1e-3)
    monkeypatch.setattr("owlore_tune.training.plan.free_bytes", lambda device: 10**6)  # as of a GPU
    with pytest.raises(
        ConfigError, match=r"the device has 0\.0 GB free, .*, and the plan is .* GB; none of the settings"
    ):
        recipe_of(tiny_config).setup()
    monkeypatch.setattr("owlore_tune.training.plan.free_bytes", lambda device: 9 * 10**8)
    assert "device_memory_limit=0.001 GB" in limited(tiny_config, tmp_path, 1e-3)


def test_a_plan_within_the_limit_runs(tiny_config):
    recipe = recipe_of(tiny_config | {"device_memory_limit": 1000})
    recipe.setup()
    recipe.train()
    manifest = json.loads((recipe.settings.output_dir / "manifest.json").read_text())
    planned, measured = manifest["memory_bytes"].values()
    assert planned.pop("total") == sum(planned.values())
    for category in ("weights", "projected", "bases"):
        assert measured[category] == planned[category] > 0
    assert measured["moments"] == pytest.approx(planned["moments"], abs=4 * 100)  # step counters


def test_the_command_prints_every_category_and_draws_a_picture(tmp_path):
    """The model is not downloaded, so rows have the tokenizer's maximum length."""
    picture = tmp_path / "new" / "plan.png"
    command = Command(
        "owlore", "memory", "--config", "llama2/7B_owlore", "--output", str(picture), "device=cpu",
        f"output_dir={tmp_path / 'run'}", "checkpointer.checkpoint_dir=/nowhere", "model.num_layers=2",
        "model._component_=torchtune.models.llama2.llama2", "model.vocab_size=100", "model.num_heads=2",
        "model.num_kv_heads=2", "model.embed_dim=64", "model.max_seq_len=512", "owlore.num_active_layers=1",
        "owlore.rank=8",
    )  # fmt: skip
    output, errors = command.communicate()
    assert command.returncode == 0, errors
    assert "Planning for rows of tokenizer.max_seq_len=512" in errors + output
    categories = [line.split()[0] for line in output.splitlines() if line.split()[0] in (*CATEGORIES, "total")]
    assert categories == [*(category for category in CATEGORIES if category not in ("gathered", "merging")), "total"]
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("device", "dtype", "is_fused"),
    [("cuda", "bfloat16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False)],
)
def test_a_plan_counts_what_a_norm_keeps_on_a_gpu(device, dtype, is_fused):
    """torch fuses it there, if weight and input have one dtype: it keeps its input, and a number for each row."""
    with torch.device("meta"), _fused_as_on(torch.device(device)):
        x = torch.empty(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        weight, saved = torch.empty(64, dtype=getattr(torch, dtype)), {}

        def keep(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = F.rms_norm(x, (64,), weight, 1e-5)
        result.sum().backward()
    fused = x.nbytes + weight.nbytes + 2 * 8 * 4
    assert sum(saved.values()) == fused if is_fused else sum(saved.values()) > 1.5 * fused
    assert result.shape == x.grad.shape == x.shape


def test_a_plan_for_gpus_counts_what_they_offload_wherever_it_is_made(tiny_config):
    config = tiny_config | {"device": "cpu", "owlore": tiny_config["owlore"] | {"inactive_state": "offload"}}
    settings = TrainingSettings.from_config(OmegaConf.create(config))
    here, there = (plans_of_config(each, 64)["this config"] for each in (settings, settings.for_gpu()))
    assert here.moments == 2 * there.moments  # 4 layers against 2
    assert there.framework == there.allocator == 0


@pytest.mark.parametrize(("rank", "stays"), [(8, True), (None, False)])
def test_offloaded_weights_leave_low_rank_state_on_the_gpu(rank, stays, tiny_config):
    config = tiny_config | {"device": "cpu", "fsdp_cpu_offload": True}
    config["owlore"] = config["owlore"] | {"rank": rank}
    settings = TrainingSettings.from_config(OmegaConf.create(config))
    both = settings, settings.for_gpu()
    here, there = (plans_of_config(each, 64, world_size=2)["this config"] for each in both)
    assert here.weights > there.weights
    assert (there.moments > 0) == stays
    assert here.bases == there.bases and here.moments > there.moments


def test_offloading_is_tried_if_it_can_save_memory(tiny_config):
    settings = TrainingSettings.from_config(OmegaConf.create(tiny_config | {"device": "cpu"}))
    offload = ("fsdp_cpu_offload=true",)
    on_cuda = replace(settings, device=torch.device("cuda"))
    assert offload in savings(on_cuda, Sharding(2))
    assert offload not in savings(on_cuda, None) + savings(settings, Sharding(2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = bytearray(2 * 10**9)
    program = "import torch; from owlore_tune.measure import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    peak = int(subprocess.check_output([sys.executable, "-c", program], text=True).split()[-1])
    assert 10**8 < peak < len(block)


def test_settings_that_fit_a_card_are_found(tiny_config, tmp_path, capsys, monkeypatch):
    """With the same rows per step, and a tenth of the card free."""
    small = {"model": {"num_layers": 1}, "owlore": {"num_active_layers": 1}}
    config = tiny_config | {key: tiny_config[key] | value for key, value in small.items()} | {"dtype": "bf16"}
    cfg = OmegaConf.create(config | {"batch_size": 1, "gradient_accumulation_steps": 2})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    command = ["owlore", "memory", "--config", str(tmp_path / "config.yaml"), "--seq-len", "64", "--fit"]

    def total(*overrides):
        return plan_run(TrainingSettings.from_config(override(cfg, overrides)).for_gpu(), 64).total

    least = total("enable_activation_checkpointing=true", "owlore.weights=nf4")
    for gb in (1.01 * least / FREE_SHARE / 1e9, 24):
        monkeypatch.setattr(sys, "argv", [*command, str(gb)])
        cli.main()
        overrides = capsys.readouterr().out.splitlines()[0].split()
        found = override(cfg, overrides)
        assert found.batch_size * found.gradient_accumulation_steps == 2
        assert total(*overrides) <= FREE_SHARE * 1e9 * gb
    message = refused(cli.main, [*command[1:], str(0.5 * least / 1e9)], capsys, monkeypatch)
    assert "with a tenth free; the smallest plan is" in message
