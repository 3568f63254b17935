"""A resumed run is bit-identical to an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from owlore_tune.checkpoints.steps import verify
from owlore_tune.checkpoints.training_state import get_rng_state, set_rng_state
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.optim.moments import state_bytes
from runs import (
    assert_weights,
    checkpoints,
    finetune,
    finetune_until,
    poison,
    prepare,
    start,
    unbroken_weights,
    variant,
    weights,
)


def assert_same_bits(one: dict, other: dict) -> None:
    assert_weights(other, weights(one))


CASES = {
    "mid-interval": {},
    "between refreshes": {"owlore__update_gap": 2, "owlore__resample_every": 5},
    "project": {"owlore__update_gap": 2, "owlore__moments": "project"},
    "reset": {"owlore__update_gap": 2, "owlore__moments": "reset"},
    "bernoulli": {"owlore__draw": "bernoulli"},
    "sequential": {"owlore__draw": "sequential"},
    "keep": {"owlore__inactive_state": "keep", "owlore__resample_every": 2, "dtype": "bf16"},
    "offload": {"owlore__inactive_state": "offload", "owlore__resample_every": 2, "dtype": "bf16"},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "lisa": {"owlore__rank": None, "owlore__train_embeddings": True, "owlore__train_output": True},
    "stochastic bf16": {"dtype": "bf16", "owlore__update_gap": 2},
    "8-bit moments": {
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 3e-4, "bf16_stochastic_round": True},
        "owlore__rank": None, "dtype": "bf16",
    },
    "SGD": {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}},
    "schedule": {
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 3,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_unbroken_one(case, tiny_config, monkeypatch):
    """2 epochs of 10 steps, killed after steps 4 and 17, with checkpoints every 3 steps and after each epoch."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # torchao needs a C++ compiler
    config = variant(tiny_config, "unbroken", epochs=2, **CASES[case])
    broken = variant(config, "broken", save_every_n_steps=3)
    unbroken = finetune(config)
    finetune_until(broken, 4)
    resumed = variant(broken, "", resume_from_checkpoint=True) | {"output_dir": broken["output_dir"]}
    finetune_until(resumed, 17)
    assert [d.name for d in checkpoints(broken)] == [f"step_{n}" for n in (3, 6, 9, 10, 12, 15)]
    recipe = finetune(resumed)
    assert_same_bits(config, broken)
    assert state_bytes(recipe.optimizer) == state_bytes(unbroken.optimizer)
    drop_times = [{k: v for k, v in d.items() if k != "refresh_seconds"} for d in unbroken.report.records.draws]
    assert [{k: v for k, v in d.items() if k != "refresh_seconds"} for d in recipe.report.records.draws] == drop_times
    lines = (Path(broken["output_dir"]) / "draws.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [draw["step"] for draw in unbroken.report.records.draws]


@pytest.mark.parametrize("changes", [{}, CASES["stochastic bf16"]], ids=["fp32", "stochastic bf16"])
def test_a_run_resumed_at_the_end_of_an_epoch_equals_the_unbroken_one(changes, tiny_config):
    """Validation does not matter: only training uses the global generator."""
    config = variant(tiny_config, "unbroken", epochs=2, **changes)
    broken = variant(config, "broken", run_val_every_n_steps=3)
    finetune(config)
    finetune_until(broken, 12)
    recipe = prepare(broken | {"resume_from_checkpoint": True})
    assert recipe.progress.step == 10
    recipe.train()
    assert_same_bits(config, broken)


def test_checkpoints_after_the_one_resumed_from_are_set_aside(tiny_config):
    config = variant(tiny_config, "branch", save_every_n_steps=3)
    finetune(config)
    output_dir = Path(config["output_dir"])
    finetune_until(config | {"resume_from_checkpoint": f"{output_dir}/step_3", "keep_last_n": 1}, 7)
    assert [d.name for d in checkpoints(config)] == ["step_6"]
    assert sorted(d.name for d in output_dir.glob("abandoned_*")) == [f"abandoned_step_{n}" for n in (10, 6, 9)]
    finetune(config | {"resume_from_checkpoint": True})


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny_config):
    fresh = variant(tiny_config, "fresh", resume_from_checkpoint=True)
    finetune(tiny_config)
    finetune(fresh)
    assert_same_bits(tiny_config, fresh)


def test_a_finished_run_has_nothing_left_to_do(tiny_config):
    finetune(tiny_config)
    before = weights(tiny_config)
    recipe = finetune(tiny_config | {"resume_from_checkpoint": True})
    assert recipe.progress.step == 10
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tiny_config).items())


def test_another_runs_checkpoints_are_not_written_over(tiny_config):
    finetune(tiny_config)
    with pytest.raises(ConfigError, match=r"holds run \w{8}; choose another directory"):
        finetune(tiny_config)


def test_a_named_checkpoint_is_taken(tiny_config):
    config = variant(tiny_config, "named", save_every_n_steps=3)
    finetune(config)
    end = weights(config)
    named = f"{config['output_dir']}/step_3"
    recipe = prepare(config | {"resume_from_checkpoint": named})
    assert recipe.progress.step == 3
    recipe.train()
    assert all(torch.equal(weight, end[name]) for name, weight in weights(config).items())


def test_old_checkpoints_are_removed(tiny_config):
    config = variant(tiny_config, "kept", save_every_n_steps=1, keep_last_n=2)
    finetune(config)
    assert [d.name for d in checkpoints(config)] == ["step_9", "step_10"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda d: os.truncate(d / "model.safetensors", 1000),
    "flipped byte": lambda d: flip(d / "model.safetensors"),
    "flipped byte in the state": lambda d: flip(d / "recipe_state.pt"),
    "missing file": lambda d: (d / "recipe_state.pt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, tiny_config, monkeypatch):
    warnings = []
    monkeypatch.setattr("owlore_tune.checkpoints.steps.log.warning", warnings.append)
    config = variant(tiny_config, "damaged", save_every_n_steps=3)
    finetune(config)
    end = weights(config)
    *_, before, newest = checkpoints(config)
    DAMAGES[damage](newest)
    recipe = prepare(config | {"resume_from_checkpoint": True})
    assert recipe.progress.step == 9
    assert any(newest.name in warning for warning in warnings)
    recipe.train()
    verify(newest)
    assert all(torch.equal(weight, end[name]) for name, weight in weights(config).items())


def test_only_damaged_checkpoints_are_an_error(tiny_config):
    finetune(tiny_config)
    flip(Path(tiny_config["output_dir"]) / "step_10" / "model.safetensors")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints in .* is undamaged"):
        finetune(tiny_config | {"resume_from_checkpoint": True})
    with pytest.raises(ConfigError, match="resume_from_checkpoint=.*step_10: .*is damaged"):
        finetune(tiny_config | {"resume_from_checkpoint": f"{tiny_config['output_dir']}/step_10"})


CHANGES = {
    "γ": ("owlore.num_active_layers=2 -> 1", {"owlore__num_active_layers": 1}),
    "K": ("owlore.resample_every=3 -> 4", {"owlore__resample_every": 4}),
    "rank": ("owlore.rank=8 -> 4", {"owlore__rank": 4}),
    "lr": ("optimizer.lr=0.0003 -> 0.001", {"optimizer__lr": 1e-3}),
    "seed": ("seed=42 -> 7", {"seed": 7}),
    "data": ("rows per step=4 -> 5", {"batch_size": 5}),
    "epochs": ("epochs=1 -> 2", {"epochs": 2}),
    "dtype": ("dtype=fp32 -> bf16", {"dtype": "bf16"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_config_is_refused(change, tiny_config):
    message, changes = CHANGES[change]
    config = variant(tiny_config, "run", save_every_n_steps=4)
    finetune_until(config, 5)
    other = variant(config, "", resume_from_checkpoint=True, **changes) | {"output_dir": config["output_dir"]}
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        finetune(other)


def test_settings_that_change_nothing_may_change(tiny_config):
    config = variant(tiny_config, "run", save_every_n_steps=4)
    finetune_until(config, 5)
    finetune(config | {"resume_from_checkpoint": True, "log_every_n_steps": 2, "keep_last_n": 1})
    unbroken = variant(tiny_config, "unbroken")
    finetune(unbroken)
    assert_same_bits(unbroken, config)


def test_rng_states_come_back(tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    torch.save(get_rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3), np.random.rand(3), random.random()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], again[0])
    assert (expected[1] == again[1]).all()
    assert expected[2] == again[2]


def wait_for_step(config: dict, process: Command) -> None:
    while not list(Path(config["output_dir"]).glob("step_*[0-9]")):
        assert process.returncode is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, tiny_config):
    config = variant(tiny_config, "signal", epochs=10, save_every_n_steps=20, keep_last_n=1)
    process = start(config)
    wait_for_step(config, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = errors.strip().splitlines()[-1]
    saved = checkpoints(config)[-1]
    assert last.startswith(
        f"{number.name}: stopped after step {saved.name[5:]}, saved in {saved}. To continue, resume with the sa"
    )
    assert "Traceback" not in output + errors
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(tiny_config, epochs=10, keep_last_n=1))


def test_a_later_signal_ends_at_once_and_one_at_the_same_time_does_not():
    code = (
        "import os, signal, time; from owlore_tune.training.signals import ONE_REQUEST, StopRequest\n"
        "with StopRequest() as stop, stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(stop.signal.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('passed on', flush=True)\n"
        "    time.sleep(ONE_REQUEST + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("SIGTERM\npassed on\n", 128 + signal.SIGTERM)


def test_the_layer_with_a_bad_gradient_is_named(tiny_config, monkeypatch):
    import owlore_full_finetune

    warnings = []
    monkeypatch.setattr(owlore_full_finetune.log, "warning", warnings.append)
    config = variant(tiny_config, "named", clip_grad_norm=1.0, owlore__num_active_layers=None)
    recipe = prepare(config)
    weight = recipe.layers.layers[1].weights["layers.1.mlp.w2.weight"].trained.requires_grad_(True)
    weight.register_hook(lambda grad: grad * float("nan") if recipe.progress.step == 4 else grad)
    recipe.train()
    (warning,) = [w for w in warnings if w.startswith("Step 4:")]
    assert "['layers.1']" in warning


@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize("bad", [{4}, {0}, {3, 4}], ids=["any step", "the first refresh", "a draw"])
def test_a_step_that_is_not_finite_is_skipped(tiny_config, bad, rank):
    config = variant(tiny_config, "poisoned", owlore__rank=rank)
    recipe = prepare(config)
    poison(recipe, bad)
    recipe.train()
    assert recipe.progress.skipped_steps == len(bad)
    assert all(weight.isfinite().all() for weight in weights(config).values())
    manifest = json.loads((Path(config["output_dir"]) / "manifest.json").read_text())
    assert manifest["skipped_steps"] == len(bad)
    assert manifest["held_out_loss"]["after"] < manifest["held_out_loss"]["before"]


def test_too_many_skipped_steps_stop_the_run_with_a_checkpoint(tiny_config):
    config = variant(tiny_config, "poisoned", max_skipped_steps=3)
    recipe = prepare(config)
    poison(recipe, set(range(4, 100)))
    message = "3 steps in a row had a loss or gradient that is not finite; .* Checkpoints in .*: .*step_7; a new run"
    with pytest.raises(RunError, match=message):
        recipe.train()
    assert checkpoints(config)[-1].name == "step_7"
    assert all(weight.isfinite().all() for weight in weights(config).values())


@pytest.mark.parametrize("seen_coming", [True, False])
def test_a_full_disk(seen_coming, tiny_config, small_disk, monkeypatch):
    """2 MB hold a few checkpoints. The next save finds no space, before or during writing."""
    if not seen_coming:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    run = small_disk / "run"
    config = tiny_config | {
        "output_dir": str(run), "save_every_n_steps": 1, "dataset_val": None,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
    }  # fmt: skip
    recipe = prepare(config)
    reason = "only [0-9,]+ bytes are free" if seen_coming else "No space left on device|write|unexpected pos"
    message = (
        rf"cannot save {run}/step_\d+, which needs [\d,]+ bytes: .*(?:{reason}).* The newest checkpoint is {run}/st"
    )
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()  # otherwise the disk cannot be unmounted
    assert recipe.progress.step < 10
    good = checkpoints(config)[-1]
    verify(good)
    load_file(good / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(good)
    assert not list(run.glob("*.partial"))
