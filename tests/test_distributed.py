"""The recipe on several ranks against one process: weights, resuming, communication, and lost ranks."""

import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from near import assert_same_shares
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_sealed import small_disk  # noqa: F401
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from owlore_tune.checkpoints.state import load_state
from owlore_tune.distributed.launch import let_gloo_finish
from owlore_tune.distributed.world import current_world, shard_like
from owlore_tune.errors import ConfigError
from owlore_tune.optim.projection import OVERSAMPLING, SKETCH_ROWS
from owlore_tune.run.build import build_inputs
from owlore_tune.run.directory import RunDirectory
from owlore_tune.run.settings import TrainingSettings
from runs import finetune, other_model, recipe_of, variant, weights

PROGRAMS = Path(__file__).parent / "distributed_programs.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(num_ranks: int, *arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return subprocess.run(
        [*command, *options, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )


def train_together(num_ranks: int, *configs: dict) -> None:
    """Train each of ``configs`` on ``num_ranks`` ranks, one after the other."""
    files = [write(config) for config in configs]
    result = torchrun(num_ranks, PROGRAMS, "train", *files)
    assert result.returncode == 0, result.stderr[-3000:]


def write(config: dict) -> Path:
    file = Path(f"{config['output_dir']}.yaml")
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def furthest(one: dict, other: dict) -> float:
    """Return the largest difference between the final weights of two runs."""
    theirs = weights(other)
    return max((weight - theirs[name]).abs().max().item() for name, weight in weights(one).items())


@pytest.fixture
def config(tiny_config) -> dict:
    """12 steps of 6 rows over 4 draws. A large eps keeps Adam from amplifying rounding errors."""
    config = tiny_config | {"batch_size": 6, "epochs": 2}
    config["optimizer"] = config["optimizer"] | {"eps": 1e-3}
    config["owlore"] = config["owlore"] | {"update_gap": 4}
    return config


def on_ranks(num_ranks: int, config: dict, name: str, **changes) -> dict:
    return variant(config, name, **{"batch_size": 6 // num_ranks, "batch_size_val": 2, **changes})


ALL_TRAINED = {"owlore__train_embeddings": True, "owlore__train_output": True, "owlore__train_norm": True}
CASES = {
    # On a CPU both offload settings are accepted and have no effect.
    "projected moments": {
        "owlore__inactive_state": "offload",
        "owlore__moments": "project",
        "fsdp_cpu_offload": True,
    },
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
        assert [d["active"] for d in manifest["draws"]] == [d["active"] for d in recipe._report.records.draws]
        assert len(manifest["draws"]) == 4
        for when, loss in recipe._report.records.losses.items():
            assert manifest["held_out_loss"][when] == pytest.approx(loss, abs=1e-5)
        ours = [json.loads(line) for line in (Path(several["output_dir"]) / "steps.jsonl").read_text().splitlines()]
        for step, other in zip(ours, recipe._report.records.steps, strict=True):
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
        expected = recipe._scores.scores
        scores = json.loads((Path(two["output_dir"]) / "scores.json").read_text())["scores"]
        if one["owlore"]["score"] in ("outlier", "reverse"):
            assert_same_shares(scores, expected, recipe._model)
        else:
            assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_one_rank_under_torchrun_is_the_single_device_recipe_bit_for_bit(config):
    config |= {"enable_activation_checkpointing": True, "clip_grad_norm": 0.1}
    finetune(config)
    rank = variant(config, "rank")
    train_together(1, rank)
    assert furthest(config, rank) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_on_cuda_one_rank_trains_as_the_recipe_for_one_device(offload, config):
    """NCCL and bf16: losses agree within bf16 noise, also with parameter offload."""
    config |= {"device": "cuda", "dtype": "bf16"}
    steps = finetune(config)._report.records.steps
    rank = variant(config, "rank", fsdp_cpu_offload=offload)
    train_together(1, rank)
    lines = (Path(rank["output_dir"]) / "steps.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx([step["loss"] for step in steps], rel=1e-2)


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
    """Resume in the middle of an interval and of an epoch. On the same number of ranks, it is bit-identical."""
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


QUANTIZED = {
    "int8": {"owlore__weights": "int8", "owlore__products": "int8"},
    "nf4": {"owlore__weights": "nf4"},
    "nf4, all layers": {"owlore__weights": "nf4", "owlore__num_active_layers": None, "owlore__score": "uniform"},
}


@pytest.mark.parametrize("names", [["nf4"], pytest.param(["int8", "nf4, all layers"], marks=pytest.mark.slow)], ids=str)
def test_quantized_weights_train_on_two_ranks_as_in_one_process(names, config, tmp_path):
    """Every rank has all weights. The first one writes layers that leave. Resumed, they have the same bits.

    With int8 products, a rounding error can move an input to the next of 255 values.
    """
    config = other_model(config, tmp_path / "wide", num_kv_heads=4, embed_dim=64, intermediate_dim=128)
    ones = [variant(config, f"one_{name}", **QUANTIZED[name]) for name in names]
    twos = [on_ranks(2, one, "two", save_every_n_steps=4) for one in ones]
    again = [
        on_ranks(2, one, "again", resume_from_checkpoint=f"{two['output_dir']}/step_4")
        for one, two in zip(ones, twos, strict=True)
    ]
    train_together(2, *twos, *again)
    for one, two, resumed in zip(ones, twos, again, strict=True):
        recipe = finetune(one)
        assert furthest(one, two) < (1e-3 if "int8" in one["output_dir"] else 1e-5)
        assert furthest(two, resumed) == 0
        manifest = json.loads((Path(two["output_dir"]) / "manifest.json").read_text())
        for when, loss in recipe._report.records.losses.items():
            assert manifest["held_out_loss"][when] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_ranks_is_a_model_directory(config):
    run = on_ranks(2, config, "run")
    train_together(2, run)
    (checkpoint,) = RunDirectory.existing(Path(run["output_dir"])).steps.own()[-1:]
    assert RunDirectory.existing(Path(run["output_dir"])).steps.newest() == checkpoint
    exported = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(exported[name], weight)


def count(num_ranks: int, config: dict, tmp_path: Path) -> list[list[dict]]:
    """Return the bytes sent and the optimizer state size for each rank and step."""
    output = tmp_path / f"{Path(config['output_dir']).name}_counts"
    result = torchrun(num_ranks, PROGRAMS, "count", output, write(config))
    assert result.returncode == 0, result.stderr[-3000:]
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
            products += 4 * (sketch + n * width + 2 * m * width + m * SKETCH_ROWS + n * rank)
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
    result = torchrun(2, PROGRAMS, "poison", write(config))
    assert result.returncode == 0, result.stderr[-3000:]
    manifest = json.loads((Path(config["output_dir"]) / "manifest.json").read_text())
    assert manifest["skipped_steps"] == 1
    active = [draw["active"] for draw in manifest["draws"] if draw["step"] <= 4][-1]
    places = sorted(f"layers.{layer}" for layer in active)
    assert f"gradients not finite in {places}; no update" in result.stderr
    assert all(weight.isfinite().all() for weight in weights(config).values())


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_ranks(*configs: dict) -> list[subprocess.Popen]:
    """Start one rank per config without torchrun, so no agent stops the other ranks."""
    port = str(free_port())
    processes = []
    for rank, file in enumerate(map(write, configs)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(configs)), "MASTER_PORT": port}
        command = [sys.executable, "-m", "owlore_full_finetune", "--config", str(file)]
        environment = ENVIRONMENT | place | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return processes


def start_torchrun(
    config: dict, *options: str, nodes: tuple[str, ...] = ("--standalone", "--nproc_per_node=2")
) -> subprocess.Popen:
    """Start torchrun with two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, *options]
    command += ["-m", "owlore_full_finetune", "--config", str(write(config))]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def ranks_of(agent: subprocess.Popen) -> list[int]:
    """Return the process ids of torchrun's ranks."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def wait_for(path: Path, pattern: str, seconds: float = 120) -> None:
    started = time.monotonic()
    while not any(path.glob(pattern)):
        assert time.monotonic() - started < seconds, f"no {pattern} in {path}"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed between saves", "killed in a save", "hung"])
def test_when_a_rank_is_lost_the_others_end_and_the_run_goes_on(how, config):
    """Rank 1 dies or hangs. Rank 0 reports it before the timeout, and the newest checkpoint is readable."""
    config = on_ranks(2, config, "lost", save_every_n_steps=2, dist_timeout_s=15, epochs=12)
    output_dir = Path(config["output_dir"])
    ranks = start_ranks(config, config)
    wait_for(output_dir, "step_4")
    if how == "killed in a save":
        wait_for(output_dir, "step_*.partial")
    ranks[1].send_signal(signal.SIGSTOP if how == "hung" else signal.SIGKILL)
    stopped = time.monotonic()
    _, errors = ranks[0].communicate(timeout=60)
    assert time.monotonic() - stopped < 15 + 10
    assert ranks[0].returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and "resume_from_checkpoint=true" in last, errors[-2000:]
    ranks[1].kill()
    ranks[1].communicate()
    newest = RunDirectory.existing(output_dir).steps.newest()
    assert newest is not None
    train_together(2, config | {"resume_from_checkpoint": True})
    assert json.loads((output_dir / "manifest.json").read_text())["finished"]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(config):
    """A rank kills itself once. `--max-restarts` restarts both ranks, and the final weights are unchanged."""
    unbroken = on_ranks(2, config, "unbroken")
    train_together(2, unbroken)
    restarted = on_ranks(2, config, "restarted", save_every_n_steps=1, resume_from_checkpoint=True)
    agent = start_torchrun(restarted, "--max-restarts=2")
    wait_for(Path(restarted["output_dir"]), "step_[3-9]")
    os.kill(random.choice(ranks_of(agent)), signal.SIGKILL)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0, errors[-3000:]
    assert re.search(r"Resumed from .*step_\d", errors)
    assert furthest(unbroken, restarted) == 0


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_stops_all(config):
    config = on_ranks(2, config, "stopped", epochs=40, save_every_n_steps=3)
    ranks = start_ranks(config, config)
    wait_for(Path(config["output_dir"]), "step_3")
    ranks[1].terminate()
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 128 + signal.SIGTERM, errors[-2000:]
    saved = RunDirectory.existing(Path(config["output_dir"])).steps.newest()
    assert saved is not None and f"SIGTERM: stopped after step {saved.name[5:]}, saved in {saved}" in errors


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one(config):
    """Two torchruns with one rank each, like two machines with a shared disk."""
    together, apart = (on_ranks(2, config, name) for name in ("together", "apart"))
    train_together(2, together)
    port = free_port()
    nodes = [
        start_torchrun(
            apart, nodes=("--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", f"--master_port={port}")
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors[-3000:]
    assert furthest(together, apart) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_and_its_ranks_alike_is_one_request(number, config):
    """Like a scheduler's signal: torchrun forwards it, so each rank gets it twice."""
    config = on_ranks(2, config, "stopped", epochs=400, save_every_n_steps=3)
    agent = start_torchrun(config)
    wait_for(Path(config["output_dir"]), "step_3")
    for pid in (*ranks_of(agent), agent.pid):
        os.kill(pid, number)
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode != 0
    saved = RunDirectory.existing(Path(config["output_dir"])).steps.newest()
    assert saved is not None and f"{number.name}: stopped after step {saved.name[5:]}, saved in {saved}" in errors


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_its_message(config, small_disk):  # noqa: F811
    run = on_ranks(2, config | {"output_dir": str(small_disk / "run")}, "full", save_every_n_steps=1)
    run["output_dir"] = str(small_disk / "run")
    file = Path(config["output_dir"]).with_suffix(".yaml")
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(run | {"dataset_val": None})))
    started = time.monotonic()
    result = torchrun(2, "-m", "owlore_full_finetune", "--config", file)
    assert result.returncode == 1 and time.monotonic() - started < 100
    assert re.search(r"error: cannot save .*step_\d+, which needs .* bytes", result.stderr), result.stderr[-2000:]
    assert "another process" not in result.stderr


@pytest.fixture
def fake_ranks():
    """A fake process group of two ranks; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


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


def test_a_value_for_several_ranks_is_refused_on_one_device(config):
    with pytest.raises(ConfigError, match="fsdp_cpu_offload=true; it needs FSDP2: launch with tune run --nproc_per"):
        recipe_of(config | {"fsdp_cpu_offload": True})


@pytest.mark.slow
def test_ranks_with_output_directories_of_their_own_are_refused(config):
    """Without a shared disk, a checkpoint would lack the files of the other ranks."""
    ranks = start_ranks(on_ranks(2, config, "here"), on_ranks(2, config, "there"))
    errors = [rank.communicate(timeout=60)[1].strip().splitlines()[-1] for rank in ranks]
    assert re.match(r"error: output_dir=.*_there is not the same directory as on rank 0; choose one on a", errors[1])
    assert re.match(r"error: rank 1 failed: ConfigError: output_dir=.*_there is not", errors[0])
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert not any(Path(f"{config['output_dir']}").glob("**/.shared*"))


def test_another_number_of_rows_per_step_is_another_run(config):
    finetune(config)
    changed = variant(config, "changed", batch_size=3, resume_from_checkpoint=f"{config['output_dir']}/step_12")
    with pytest.raises(ConfigError, match="rows per step=6 -> 3"):
        recipe_of(changed).setup()


@pytest.mark.slow
def test_smollm2_on_two_ranks_trains_as_in_one_process(smollm2_dir, tmp_path):
    """`tune run` by name, 12 steps over 4 draws at rank 16: weights within 5e-6 (see benchmarks/distributed.py)."""
    overrides = [
        f"checkpointer.checkpoint_dir={smollm2_dir}", "dataset_val=null", "tokenizer.max_seq_len=128",
        "max_steps_per_epoch=12", "owlore.resample_every=3", "owlore.num_active_layers=2", "owlore.rank=16",
        "optimizer.eps=1e-3", "owlore.update_gap=5", "owlore.score=uniform", "device=cpu", "lr_scheduler=null",
    ]  # fmt: skip
    one = ["tune", "run", "owlore_full_finetune", "--config", "smollm2/135M_owlore", "batch_size=2"]
    two = ["tune", "run", "--nproc_per_node", "2", "owlore_full_finetune", "--config"]
    two += ["smollm2/135M_owlore", "batch_size=1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command in (("one", one), ("two", two)):
        command = [*command, *overrides, f"output_dir={tmp_path / name}"]
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | {"PATH": path})
        assert result.returncode == 0, result.stderr[-3000:]
    assert furthest({"output_dir": tmp_path / "one"}, {"output_dir": tmp_path / "two"}) < 5e-6


def test_gloo_has_freed_its_tensors_before_python_shuts_down():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD  # as DTensor's caches do
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(10)  # seconds for which gloo's thread waits for the GIL, unless this thread releases it
        for _ in range(100):  # until the thread does not free a tensor before this one lets go of it
            tensor = torch.ones(1000)
            freed = weakref.ref(tensor)
            group.allreduce([tensor])
            del tensor
            ctypes.PyDLL(None).usleep(20_000)  # in which the thread is done, but for the GIL
            if freed() is not None:
                break
        assert freed() is not None
        let_gloo_finish()
        assert freed() is None
    finally:
        sys.setswitchinterval(interval)
        dist.destroy_process_group()
