"""The recipe on several ranks against one process: weights, resuming and communication."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_programs import SentBytes
from forks import run_command
from near import assert_same_shares
from omegaconf import OmegaConf
from ranks import furthest, on_ranks, run_ranks, torchrun, train_together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune.models.llama2 import llama2
from transformers import AutoModelForCausalLM

from owlore_tune.checkpoints.training_state import load_state
from owlore_tune.distributed.fsdp import Sharding, clip_grad_norm_, shard_model, sum_grads
from owlore_tune.distributed.launch import current_world
from owlore_tune.distributed.world import ALONE, shard_like
from owlore_tune.errors import ConfigError
from owlore_tune.models.decoder import init_rope
from owlore_tune.optim.bases import OVERSAMPLING
from owlore_tune.training.components import build_inputs
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.output_dir import RunDirectory
from owlore_tune.training.records import read_records
from runs import finetune, other_model, variant, weights, write

ALL_TRAINED = {"owlore__train_embeddings": True, "owlore__train_output": True, "owlore__train_norm": True}
CASES = {
    # On a CPU both offload settings are accepted and have no effect.
    "projected moments": {"owlore__inactive_state": "offload", "owlore__moments": "project", "fsdp_cpu_offload": True},
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "batch_size": 2},
    "checkpointing": {"enable_activation_checkpointing": True},
    "everything trained": ALL_TRAINED,
    "GaLore's side": {"owlore__side": "shape", "owlore__basis": "svd"},
    "replicated": {"fsdp": False, "gradient_accumulation_steps": 3, "batch_size": 2} | ALL_TRAINED,
    "full rank": {"owlore__rank": None},
    "all layers": {"owlore__num_active_layers": None, "owlore__score": "uniform"},
    "chunked loss": {"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}},
    "compiled": {"compile": True},
    "no reshard": {"fsdp_reshard_after_forward": False, "clip_grad_norm": 0.01},
}


def single(case: dict) -> dict:
    return {key: value for key, value in case.items() if not key.startswith("fsdp_")}


OTHERS = [name for name in CASES if name != "plain"]


@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [
        pytest.param(2, ["plain"], id="2"),
        pytest.param(2, OTHERS, id="2, other settings", marks=pytest.mark.slow),
        pytest.param(3, ["plain", "everything trained"], id="3", marks=pytest.mark.slow),
    ],
)
def test_ranks_together_train_as_one_process(num_ranks, names, config):
    """Weights agree within 1e-6. On three ranks, no dimension divides evenly."""
    pairs = []
    for name in names:
        case = CASES[name]
        batch = case.get("batch_size", 6)
        one = variant(config, f"one_{name}", **single(case))
        pairs.append((one, on_ranks(num_ranks, config, name, **case | {"batch_size": batch // num_ranks})))
    train_together(num_ranks, *(several for _, several in pairs))
    for one, several in pairs:
        recipe = finetune(one)
        assert furthest(one, several) < 1e-6, several["output_dir"]
        manifest = json.loads((Path(several["output_dir"]) / "manifest.json").read_text())
        assert [d["active"] for d in manifest["draws"]] == [d["active"] for d in recipe.report.records.draws]
        assert len(manifest["draws"]) == 4
        for when, loss in recipe.report.records.losses.items():
            assert manifest["held_out_loss"][when] == pytest.approx(loss, abs=1e-5)
        ours, theirs = (read_records(Path(run["output_dir"]) / "steps.jsonl") for run in (several, one))
        for step, other in zip(ours, theirs, strict=True):
            assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_norms_of_a_bf16_model_train_on_ranks_as_in_one_process(config):
    """Compares the changes of their float32 copies. bf16 rounds activations of 3 rows unlike those of 6."""
    config = variant(config, "one", dtype="bf16", owlore__resample_every=12, owlore__train_norm=True)
    two = on_ranks(2, config, "two")
    train_together(2, two)
    finetune(config)
    norms, other_norms = (
        load_state(Path(run["output_dir"]) / "step_12")["schedule"]["layers"]["others"] for run in (config, two)
    )
    assert norms.keys() == other_norms.keys() and len(norms) == 2 * 2 + 1
    for name, norm in norms.items():
        change, other_change = norm - 1, other_norms[name] - 1
        assert norm.dtype == torch.float32 and change.abs().max() > 1e-4, name
        assert (change - other_change).norm() < 0.05 * change.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_rows_without_labels_and_held_out_rows_that_ranks_repeat_change_nothing(weights, config, tmp_path):
    """The second rank only gets rows that are cut off before their answer, and 7 rows are held out."""
    rows = json.loads(Path(config["dataset"]["data_files"]).read_text())
    (tmp_path / "held_out.json").write_text(json.dumps(rows[:7]))
    for row in rows[1::2]:
        row["instruction"] *= 50
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {"shuffle": False, "tokenizer__max_seq_len": 64, "owlore__score": "uniform", "owlore__weights": weights}
    config["dataset"] = config["dataset"] | {"data_files": str(tmp_path / "rows.json")}
    config["dataset_val"] = config["dataset_val"] | {"data_files": str(tmp_path / "held_out.json")}
    one = variant(config, "one", **changes)
    two = on_ranks(2, one, "two")
    train_together(2, two)
    recipe = finetune(one)
    assert furthest(one, two) < 1e-5
    losses = json.loads((Path(two["output_dir"]) / "manifest.json").read_text())["held_out_loss"]
    assert recipe.report.records.losses == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
def test_uneven_shards_train_as_one_process(config, tmp_path):
    """47 and 301 are odd, and the third rank gets none of the 4 key rows. Scores depend on padding."""
    sizes = dict(vocab_size=301, num_heads=3, num_kv_heads=1, embed_dim=12, intermediate_dim=47)
    changes = {"owlore__rank": 3, "owlore__score": "uniform", **ALL_TRAINED}
    one = other_model(variant(config, "one", **changes), tmp_path / "uneven", **sizes)
    two, three = (on_ranks(n, one, f"ranks_{n}") for n in (2, 3))
    finetune(one)
    train_together(2, two)
    train_together(3, three)
    assert furthest(one, two) < 1e-6 and furthest(one, three) < 1e-6


@pytest.mark.slow
def test_scores_of_shared_data_are_those_of_one_process(config):
    """Rows are packed because scores include padding, and other batches have other padded lengths."""
    kinds = ("outlier", "reverse", "weight_norm", "heavy_tail")
    config["tokenizer"]["max_seq_len"] = 64
    config["dataset"]["packed"] = True
    config |= {"dataset_val": None, "max_steps_per_epoch": 1, "batch_size": 4}
    ones = [variant(config, f"one_{kind}", owlore__score=kind, owlore__calibration_batches=2) for kind in kinds]
    twos = [variant(one, "ranks", batch_size=2) for one in ones]
    train_together(2, *twos)
    for one, two in zip(ones, twos, strict=True):
        recipe = finetune(one)
        expected = recipe.scores.scores
        scores = json.loads((Path(two["output_dir"]) / "scores.json").read_text())["scores"]
        if one["owlore"]["score"] in ("outlier", "reverse"):
            assert_same_shares(scores, expected, recipe.model)
        else:
            assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_one_rank_under_torchrun_is_the_single_device_recipe_bit_for_bit(config):
    config |= {"enable_activation_checkpointing": True, "clip_grad_norm": 0.1}
    finetune(config)
    rank = variant(config, "rank")
    agent = torchrun(rank, "--standalone", "--nproc_per_node=1")
    _, errors = agent.communicate()
    assert agent.returncode == 0, errors[-3000:]
    assert furthest(config, rank) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_on_cuda_one_rank_trains_as_the_recipe_for_one_device(offload, config):
    """NCCL and bf16: losses agree within bf16 noise, also with parameter offload."""
    config |= {"device": "cuda", "dtype": "bf16"}
    rank = variant(config, "rank", fsdp_cpu_offload=offload)
    finetune(config)
    train_together(1, rank)
    one, several = (read_records(Path(run["output_dir"]) / "steps.jsonl") for run in (config, rank))
    assert [step["loss"] for step in several] == pytest.approx([step["loss"] for step in one], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("offload", [False, True])
def test_two_gpus_train_as_one_save_and_resume(offload, config):
    config |= {"device": "cuda", "save_every_n_steps": 4}
    finetune(config)
    two = on_ranks(2, config, "two", fsdp_cpu_offload=offload)
    again = on_ranks(2, config, "again", fsdp_cpu_offload=offload, resume_from_checkpoint=f"{two['output_dir']}/step_4")
    train_together(2, two, again)
    assert furthest(config, two) < 1e-4
    assert furthest(two, again) < 1e-4


@pytest.mark.slow
def test_resume_on_any_number_of_ranks(config):
    """Resume in the middle of an interval and of an epoch. On the same number of ranks, it is bit-identical.

    A checkpoint of ranks is a model directory.
    """
    unbroken = on_ranks(2, config, "unbroken", save_every_n_steps=4)
    one = variant(config, "one", save_every_n_steps=4)
    train_together(2, unbroken)
    finetune(one)

    def resumed(source: dict, name: str, num_ranks: int) -> dict:
        checkpoint = f"{source['output_dir']}/step_4"
        return on_ranks(num_ranks, config, name, resume_from_checkpoint=checkpoint)

    two_to_two, two_to_three = resumed(unbroken, "two_to_two", 2), resumed(unbroken, "two_to_three", 3)
    one_to_two, two_to_one = resumed(one, "one_to_two", 2), resumed(unbroken, "two_to_one", 1)
    train_together(2, two_to_two, one_to_two)
    train_together(3, two_to_three)
    finetune(two_to_one)
    assert furthest(unbroken, two_to_two) == 0
    for run in (two_to_three, one_to_two, two_to_one):
        assert furthest(unbroken, run) < 1e-6
    checkpoint = RunDirectory.existing(Path(unbroken["output_dir"])).steps.newest()
    exported = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    for name, weight in weights(unbroken).items():
        assert torch.equal(exported[name], weight)


QUANTIZED = {
    "int8": {"owlore__weights": "int8", "owlore__products": "int8"},
    "nf4": {"owlore__weights": "nf4"},
    "nf4, all layers": {"owlore__weights": "nf4", "owlore__num_active_layers": None, "owlore__score": "uniform"},
}


@pytest.mark.parametrize("names", [["nf4"], pytest.param(["int8", "nf4, all layers"], marks=pytest.mark.slow)], ids=str)
def test_quantized_weights_train_on_two_ranks_as_in_one_process(names, config, tmp_path):
    """Every rank has all weights. The first one writes layers that leave.

    Resumed with the store of a GPU, which writes in the background, they have the same bits.

    With int8 products, a rounding error can move an input to the next of 255 values.
    """
    config = other_model(config, tmp_path / "wide", num_kv_heads=4, embed_dim=64, intermediate_dim=128)
    ones = [variant(config, f"one_{name}", **QUANTIZED[name]) for name in names]
    twos = [on_ranks(2, one, "two", save_every_n_steps=4) for one in ones]
    again = [
        on_ranks(2, one, "background", resume_from_checkpoint=f"{two['output_dir']}/step_4")
        for one, two in zip(ones, twos, strict=True)
    ]
    train_together(2, *twos, *again)
    for one, two, resumed in zip(ones, twos, again, strict=True):
        recipe = finetune(one)
        assert furthest(one, two) < (1e-3 if "int8" in one["output_dir"] else 1e-5)
        assert furthest(two, resumed) == 0
        manifest = json.loads((Path(two["output_dir"]) / "manifest.json").read_text())
        for when, loss in recipe.report.records.losses.items():
            assert manifest["held_out_loss"][when] == pytest.approx(loss, abs=1e-5)


def count(num_ranks: int, config: dict, tmp_path: Path) -> list[list[dict]]:
    """Return the bytes sent and the optimizer state size for each rank and step."""
    output = tmp_path / f"{Path(config['output_dir']).name}_counts"
    done = run_ranks(num_ranks, "count", output, write(config))
    assert not any(done.codes), done.output[-3000:]
    return [json.loads(output.with_suffix(f".{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.slow
def test_a_step_sends_the_gradients_of_what_trains_and_a_basis_its_products(config, tmp_path):
    """Weights that every rank has: 4 bytes for each value of A and of the norms, and a few counts."""
    config["owlore"] |= {"resample_every": 100, "num_active_layers": 2, "update_gap": 5}
    records = count(2, on_ranks(2, config, "replicated", fsdp=False, dataset_val=None), tmp_path)[0]
    rank, shapes = 8, [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]  # (m, n) in a layer
    low = 4 * 2 * (sum(m * rank for m, _ in shapes) + 2 * 32)
    for step, record in enumerate(records):
        assert record["trained_bytes"] == low
        extra = sum(record["sent"].values()) - low
        if step % 5:
            assert 0 <= extra < 200, record["sent"]
            continue
        products = 0
        for m, n in 2 * shapes:
            width = min(rank + OVERSAMPLING, m, n)
            sketch = n * width if step == 0 else 0  # a warm start replaces it
            products += 4 * (sketch + n * width + 2 * m * width + n * rank)
        assert products <= extra < products + 200, record["sent"]


@pytest.mark.slow
def test_frozen_layers_send_no_gradients(config, tmp_path):
    """FSDP2 reduces gradients only of weights that train as they are."""
    config["owlore"] |= {"resample_every": 100, "num_active_layers": 2, "rank": None}
    some = count(2, on_ranks(2, config, "some"), tmp_path)[0]
    every_layer = count(2, on_ranks(2, config, "all", **CASES["all layers"]), tmp_path)[0]
    projected = count(2, on_ranks(2, config, "projected", owlore__rank=8), tmp_path)[0]
    (reduced,) = [name for name in some[0]["sent"] if "reduce_scatter" in name]
    assert 2 * some[0]["sent"][reduced] == every_layer[0]["sent"][reduced] > 0  # 2 layers against 4
    assert projected[1]["sent"][reduced] < 0.05 * some[1]["sent"][reduced]  # norms


@pytest.mark.slow
def test_state_is_what_is_planned_and_does_not_grow(config, tmp_path):
    config["owlore"]["resample_every"] = 1
    config |= {"epochs": 4}
    two = on_ranks(2, config, "two")
    ranks = count(2, two, tmp_path)
    memory = json.loads((Path(two["output_dir"]) / "manifest.json").read_text())["memory_bytes"]
    for category in ("weights", "projected", "bases"):
        assert memory["planned"][category] == memory["measured"][category] > 0
    assert memory["measured"]["moments"] == pytest.approx(memory["planned"]["moments"], abs=4 * 100)
    for records in ranks:
        assert len(records) == 24
        assert len({record["state_bytes"] for record in records}) == 1


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_is_skipped_by_all_and_named_by_the_first(config):
    config = on_ranks(2, config, "poisoned")
    done = run_ranks(2, "poison", write(config))
    assert not any(done.codes), done.output[-3000:]
    manifest = json.loads((Path(config["output_dir"]) / "manifest.json").read_text())
    assert manifest["skipped_steps"] == 1
    active = [draw["active"] for draw in manifest["draws"] if draw["step"] <= 4][-1]
    places = sorted(f"layers.{layer}" for layer in active)
    assert f"gradients not finite in {places}; no update" in done.output
    assert all(weight.isfinite().all() for weight in weights(config).values())


@pytest.mark.parametrize("program", ["fail_alone", "turn_alone", "save_8_bits"])
def test_ranks_get_one_basis_if_an_algorithm_differs_and_save_8_bit_moments_of_shards(program):
    done = run_ranks(2, program)
    assert not any(done.codes), done.output[-3000:]


def test_replicas_round_alike(config, tmp_path):
    """torch's random numbers differ on every rank, and the optimizer rounds with them."""
    changes = {"fsdp": False, "dtype": "bf16", "owlore__rank": None, "max_steps_per_epoch": 2, "dataset_val": None}
    config["optimizer"] = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3, "bf16_stochastic_round": True}
    first, second = count(2, on_ranks(2, config, "replicas", **ALL_TRAINED | changes), tmp_path)
    assert [step["weights"] for step in first] == [step["weights"] for step in second]
    assert first[0]["weights"] != first[1]["weights"]


@pytest.mark.parametrize("max_norm", [0.5, 100.0, math.inf])
@pytest.mark.parametrize("bad", [False, True])
def test_gradients_are_clipped_as_by_torch(max_norm, bad):
    """One that is not finite leaves all as they are."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(size)) for size in (8, 20, 3)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        other.grad = torch.randn(one.shape, generator=generator)
    if bad:
        theirs[1].grad[4] = math.nan
    for one, other in zip(ours, theirs, strict=True):
        one.grad = other.grad.clone()
    norm = clip_grad_norm_(ours, max_norm, ALONE)
    expected = torch.nn.utils.clip_grad_norm_([] if bad else theirs, max_norm)
    torch.testing.assert_close(norm, expected + math.nan if bad else expected, equal_nan=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, equal_nan=True)


@pytest.fixture
def fake_ranks():
    """A fake process group of two ranks; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_gradients_of_16_bits_are_summed_in_float32(fake_ranks):
    with torch.device("meta"):
        model = llama2(64, 2, 4, 2, 32, max_seq_len=16, intermediate_dim=48).bfloat16()
    shard_model(model, torch.device("cpu"), Sharding(2))
    model.to_empty(device="cpu")
    init_rope(model)
    with SentBytes() as sent:
        model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    values = sum(parameter.numel() for parameter in model.parameters())
    assert sent.counts["_reduce_scatter_base_"] == 4 * (values + values // 2)  # all gradients, and this rank's half
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_each_gradient_is_sent_once_in_float32(fake_ranks):
    """Several at once, of one dtype: more values than are sent at once, and fewer."""
    sizes, dtypes = (2**24, 12, 11, 40), (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=each)) for size, each in zip(sizes, dtypes, strict=True)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 1 / (number + 3))
    expected = [parameter.grad.unique().tolist() for parameter in parameters]
    with SentBytes() as sent:
        sum_grads(parameters, current_world())
    assert sum(sent.counts.values()) == 4 * sum(sizes)
    assert [parameter.grad.unique().tolist() for parameter in parameters] == expected  # the fake sum changes nothing


def test_rows_of_other_ranks_never_reach_the_device(fake_ranks):
    mesh = init_device_mesh("cpu", (2,))
    like = distribute_tensor(torch.empty(5, 3, device="meta"), mesh, [Shard(0)], src_data_rank=None)
    value = torch.arange(15.0).view(5, 3)
    own = shard_like(value, like)
    assert own.shape == value.shape and torch.equal(own.to_local(), value[:3])
    assert own.to_local().data_ptr() == value.data_ptr()  # a view: nothing was copied


def test_values_that_do_not_go_with_several_ranks_are_refused(config, fake_ranks):
    with pytest.raises(ConfigError, match="samples, less than one optimizer step of batch_size=21 .* 2 processes"):
        build_inputs(TrainingSettings.from_config(OmegaConf.create(config | {"batch_size": 21})), current_world())


def test_ranks_with_other_rows_are_refused(config, tiny_data, tmp_path):
    """As from files of two machines that are not the same."""
    rows = json.loads(tiny_data.read_text())
    for rank in range(2):
        (tmp_path / f"rows_{rank}.json").write_text(json.dumps(rows[rank:] + rows[:rank]))
    data = {"dataset__data_files": str(tmp_path / "rows_${oc.env:RANK}.json"), "dataset_val": None}
    done = run_ranks(2, "train", write(on_ranks(2, config, "other_rows", **data)))
    assert all(done.codes)
    assert "dataset has other rows on rank 1; give all machines the same files" in done.output


@pytest.mark.slow
def test_smollm2_on_two_ranks_trains_as_in_one_process(smollm2_dir, tmp_path):
    """`tune run` by name, 6 steps over 3 draws at rank 16: weights within 5e-6 (see benchmarks/distributed.py)."""
    overrides = [
        f"checkpointer.checkpoint_dir={smollm2_dir}", "dataset_val=null", "tokenizer.max_seq_len=128",
        "max_steps_per_epoch=6", "owlore.resample_every=2", "owlore.num_active_layers=2", "owlore.rank=16",
        "optimizer.eps=1e-3", "owlore.update_gap=3", "owlore.score=uniform", "device=cpu", "lr_scheduler=null",
    ]  # fmt: skip
    one = ["tune", "run", "owlore_full_finetune", "--config", "smollm2/135M_owlore", "batch_size=2"]
    two = ["tune", "run", "--nproc_per_node", "2", "owlore_full_finetune", "--config"]
    two += ["smollm2/135M_owlore", "batch_size=1"]
    for name, command in (("one", one), ("two", two)):
        run_command(*command, *overrides, f"output_dir={tmp_path / name}")
    assert furthest({"output_dir": tmp_path / "one"}, {"output_dir": tmp_path / "two"}) < 5e-6
