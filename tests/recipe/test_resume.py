"""A resumed run is bit-identical to an uninterrupted one."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY_MODEL

from owlore_tune.checkpoints.steps import verify
from owlore_tune.checkpoints.training_state import get_rng_state, set_rng_state
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.optim.moments import state_bytes
from owlore_tune.training.records import read_records
from runs import (
    after_step,
    assert_resumes_exactly,
    assert_weights,
    checkpoints,
    finetune,
    finetune_until,
    kill_after,
    poison,
    prepare,
    unbroken_weights,
    variant,
    weights,
)

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
    "dropout": {"model": TINY_MODEL | {"_component_": "torchtune.models.llama2.llama2", "attn_dropout": 0.3}},
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
    finetune_until(broken | {"resume_from_checkpoint": True}, 17)
    assert [d.name for d in checkpoints(broken)] == [f"step_{n}" for n in (3, 6, 9, 10, 12, 15)]
    recipe = finetune(broken | {"resume_from_checkpoint": True})
    assert_weights(broken, weights(config))
    assert state_bytes(recipe.optimizer) == state_bytes(unbroken.optimizer)
    draws, expected = (
        [{key: value for key, value in draw.items() if key != "refresh_seconds"} for draw in each.report.records.draws]
        for each in (recipe, unbroken)
    )
    assert draws == expected
    written = read_records(Path(broken["output_dir"]) / "draws.jsonl")
    assert [draw["step"] for draw in written] == [draw["step"] for draw in draws]
    steps, expected = (read_records(Path(each["output_dir"]) / "steps.jsonl") for each in (broken, config))
    assert [(step["step"], step["loss"], step["lr"]) for step in steps] == [
        (step["step"], step["loss"], step["lr"]) for step in expected
    ]


@pytest.mark.parametrize("changes", [{}, CASES["stochastic bf16"]], ids=["fp32", "stochastic bf16"])
def test_a_run_resumed_at_the_end_of_an_epoch_equals_the_unbroken_one(changes, tiny_config):
    """Validation does not matter: only training uses the global generator."""
    config = variant(tiny_config, "broken", epochs=2, run_val_every_n_steps=3, **changes)
    finetune_until(config, 12)
    assert [d.name for d in checkpoints(config)] == ["step_10"]
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(tiny_config, epochs=2, **changes))


def test_a_resumed_run_has_the_bases_that_a_skipped_step_made(tiny_config):
    """One weight has a gradient that is not finite in step 5, which makes new bases."""
    changes = {"dataset_val": None, "owlore__update_gap": 2, "owlore__resample_every": 20, "save_every_n_steps": 5}
    unbroken, broken = (variant(tiny_config, name, **changes) for name in ("unbroken", "broken"))

    def skip_step_5(config):
        recipe, hooks = prepare(config), []

        def poison_one():
            _, weight = next(iter(recipe.layers.active_weights()))
            hooks.append(weight.trained.register_hook(lambda grad: None if grad is None else grad * math.nan))

        after_step(recipe, 4, poison_one)
        after_step(recipe, 5, lambda: hooks.pop().remove())
        return recipe

    recipe = skip_step_5(unbroken)
    recipe.train()
    recipe.cleanup()
    assert recipe.progress.skipped_steps == 1
    kill_after(skip_step_5(broken), 7)
    finetune(broken | {"resume_from_checkpoint": True})
    assert_weights(broken, weights(unbroken))


def test_a_held_out_loss_that_a_resumed_run_has_is_not_measured_again(tiny_config, monkeypatch):
    config = variant(tiny_config, "saved", run_val_every_n_steps=2, save_every_n_steps=4, max_steps_per_epoch=6)
    finetune_until(config, 5)
    recipe, validated = prepare(config | {"resume_from_checkpoint": True}), []
    assert list(recipe.report.records.losses) == ["before", "step 2", "step 4"]
    monkeypatch.setattr(recipe, "validate", lambda name, **_kwargs: validated.append(name))
    recipe.train()
    recipe.cleanup()
    assert validated == ["after"]


def test_a_run_without_a_checkpoint_begins_and_a_finished_one_has_nothing_left_to_do(tiny_config):
    assert assert_resumes_exactly(tiny_config).progress.step == 10
    before = (checkpoints(tiny_config)[-1] / "model.safetensors").stat()
    assert assert_resumes_exactly(tiny_config).progress.step == 10
    assert (checkpoints(tiny_config)[-1] / "model.safetensors").stat() == before


def test_another_runs_checkpoints_are_not_written_over(tiny_config):
    finetune(tiny_config)
    with pytest.raises(ConfigError, match=r"holds run \w{8}; choose another directory"):
        finetune(tiny_config)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tiny_config, monkeypatch):
    warnings = []
    monkeypatch.setattr("owlore_tune.checkpoints.steps.log.warning", warnings.append)
    config = variant(tiny_config, "damaged", save_every_n_steps=3)
    finetune(config)
    newest = checkpoints(config)[-1]
    flip(newest / "model.safetensors")
    assert_resumes_exactly(config)
    assert any(newest.name in warning for warning in warnings)
    verify(newest)
    assert newest.with_name(f"abandoned_{newest.name}").is_dir()


def test_only_damaged_checkpoints_are_an_error(tiny_config):
    finetune(tiny_config)
    flip(Path(tiny_config["output_dir"]) / "step_10" / "model.safetensors")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints in .* is undamaged"):
        finetune(tiny_config | {"resume_from_checkpoint": True})
    with pytest.raises(ConfigError, match="resume_from_checkpoint=.*step_10: .*is damaged"):
        finetune(tiny_config | {"resume_from_checkpoint": f"{tiny_config['output_dir']}/step_10"})


CHANGES = {
    "γ": ("owlore.num_active_layers=2 -> 1", {"owlore__num_active_layers": 1}),
    "seed": ("seed=42 -> 7", {"seed": 7}),
    "data": ("rows per step=4 -> 5", {"batch_size": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_config_is_refused(change, tiny_config):
    message, changes = CHANGES[change]
    config = variant(tiny_config, "run", save_every_n_steps=4)
    finetune_until(config, 5)
    other = variant(config, "", **changes) | {"output_dir": config["output_dir"], "resume_from_checkpoint": True}
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        finetune(other)


def test_settings_that_change_nothing_may_change(tiny_config):
    config = variant(tiny_config, "run", save_every_n_steps=4)
    finetune_until(config, 5)
    finetune(config | {"resume_from_checkpoint": True, "log_every_n_steps": 2, "keep_last_n": 1})
    assert_weights(config, unbroken_weights(tiny_config))


def test_rng_states_come_back(tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    torch.save(get_rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3), np.random.rand(3), random.random()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], again[0])
    assert (expected[1] == again[1]).all()
    assert expected[2] == again[2]


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
