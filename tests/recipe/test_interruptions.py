"""Errors, divergence and signals: remaining files, messages, and resuming."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import owlore_full_finetune
from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune import cli
from owlore_tune.data import checks as samples
from owlore_tune.data.loader import TrainingData
from owlore_tune.distributed.world import RankError
from owlore_tune.errors import CheckpointError, ConfigError, RunError, errors_in_one_line
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.training import components as build
from owlore_tune.training import plan as planning
from owlore_tune.training.report import Report
from owlore_tune.training.signals import Stop, obey_signals, stop_request
from runs import (
    after_step,
    assert_weights,
    checkpoints,
    finetune,
    finetune_until,
    prepare,
    recipe_of,
    scale_loss,
    start,
    unbroken_weights,
    variant,
    weights,
)


def broken_at(config: dict, step: int, place: str, error: BaseException) -> OwLoreFullFinetuneRecipe:
    """Build a recipe in which one of PLACES raises ``error`` after ``step`` steps."""
    recipe = prepare(config)
    owner, method = PLACES[place](recipe)
    original = getattr(owner, method)

    def raising(*args, **kwargs):
        if recipe.progress.step == step:
            raise error
        return original(*args, **kwargs)

    setattr(owner, method, raising)
    return recipe


PLACES = {
    "reading data": lambda recipe: (recipe.inputs.data, "micro_batches"),
    "forward": lambda recipe: (recipe.loss_fn, "forward"),
    "reporting": lambda recipe: (recipe.report, "step"),
    "a draw": lambda recipe: (recipe.report, "draw"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2, "batch_size": 2}], ids=["1", "2 micro-batches"]
)
def test_an_error_loses_no_step(tiny_config, place, changes):
    """Errors between steps, within a step, and at a draw: the resumed run is bit-identical to an uninterrupted one."""
    config = variant(tiny_config, "broken", dataset_val=None, **changes)
    recipe = broken_at(config, 6, place, OSError("No space left on device"))
    message = r"No space left on device. The state after step 6 is saved in .*step_6: resume with the same command and"
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(tiny_config, dataset_val=None, **changes))


@pytest.mark.parametrize("place", ["forward", "backward", "reporting"])
def test_an_error_in_a_step_with_dropout_loses_no_random_numbers(tiny_config, place):
    """Those that the failed step has drawn are drawn again."""
    model = {"_component_": "torchtune.models.llama2.llama2", "attn_dropout": 0.3}
    changes = {"dataset_val": None, "model": tiny_config["model"] | model}
    config = variant(tiny_config, "broken", **changes)
    recipe = broken_at(config, 6, "reporting" if place == "reporting" else "forward", OSError("full"))
    if place == "backward":
        original, fail = LinearCrossEntropyLoss.forward, recipe.loss_fn.forward

        def after_forward(*args):
            original(recipe.loss_fn, *args)
            return fail(*args)

        recipe.loss_fn.forward = after_forward
    with pytest.raises(RunError, match="The state after step 6 is saved"):
        recipe.train()
    recipe.cleanup()
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(tiny_config, **changes))


def test_a_row_that_another_rank_cannot_use_needs_a_new_run(tiny_config, capsys):
    """The same command would read it again."""
    error = RankError("rank 1 failed: ValueError: row 3 is too long", is_value_error=True)
    recipe = broken_at(variant(tiny_config, "rank", dataset_val=None), 3, "reading data", error)
    with pytest.raises(RankError):
        recipe.train()
    recipe.cleanup()
    assert "step_3: start a new run from its weights: checkpointer.checkpoint_dir=" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", ""], ids=["torch", "Python"])
def test_too_little_host_memory_is_told_in_one_line(tiny_config, message):
    """torch has no class of its own for it."""
    error = RuntimeError(message) if message else MemoryError()
    recipe = broken_at(variant(tiny_config, "short", dataset_val=None), 3, "forward", error)
    with pytest.raises(RunError, match="(out of|allocate) memory. The state after step 3 is saved"):
        recipe.train()
    recipe.cleanup()
    with pytest.raises(SystemExit, match="^error: .*(out of|allocate) memory$"), errors_in_one_line():
        raise error


def test_too_little_memory_for_a_save_too_leaves_the_checkpoint_before(tiny_config, monkeypatch):
    config = variant(tiny_config, "short", dataset_val=None, save_every_n_steps=2)
    recipe = broken_at(config, 3, "forward", MemoryError())

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(recipe, "_save_whole_step", no_memory)
    with pytest.raises(RunError, match="out of memory. The newest checkpoint is .*step_2: resume with the same"):
        recipe.train()
    recipe.cleanup()


def test_a_first_step_that_fails_after_a_resume_loses_no_random_numbers(tiny_config, tmp_path):
    """In a directory of its own, where the state is then saved."""
    model = {"_component_": "torchtune.models.llama2.llama2", "attn_dropout": 0.3}
    changes = {"dataset_val": None, "model": tiny_config["model"] | model, "save_every_n_steps": 4}
    unbroken = variant(tiny_config, "unbroken", **changes)
    finetune(unbroken)
    other = variant(unbroken, "other", resume_from_checkpoint=str(checkpoints(unbroken)[0]))
    recipe = prepare(other)
    original = recipe.loss_fn.forward

    def fail(*args):
        original(*args)
        raise OSError("full")

    recipe.loss_fn.forward = fail
    with pytest.raises(RunError, match="The state after step 4 is saved in .*other/step_4"):
        recipe.train()
    recipe.cleanup()
    finetune(other | {"resume_from_checkpoint": True})
    assert_weights(other, weights(unbroken))


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
def test_an_error_between_a_refresh_and_its_update_loses_no_step(tiny_config, moments):
    """In the second micro-batch of step 5, whose first one has given new bases."""
    changes = {"dataset_val": None, "gradient_accumulation_steps": 2, "batch_size": 2}
    changes |= {"owlore__moments": moments, "owlore__update_gap": 2, "owlore__resample_every": 20}
    config = variant(tiny_config, "broken", **changes)
    recipe = prepare(config)
    calls, original = [], recipe.loss_fn.forward

    def forward(*args):
        calls.append(1)
        if len(calls) == 2 * 4 + 2:
            raise torch.OutOfMemoryError("no more")
        return original(*args)

    recipe.loss_fn.forward = forward
    with pytest.raises(RunError, match="The state after step 4 is saved"):
        recipe.train()
    recipe.cleanup()
    finetune(config | {"resume_from_checkpoint": True})
    assert_weights(config, unbroken_weights(tiny_config, **changes))


def skip_step_5(recipe, then):
    """Give one weight a gradient that is not finite in step 5, which makes new bases. Call ``then`` after it."""
    hooks = []

    def poison():
        _, weight = next(iter(recipe.layers.active_weights()))
        hooks.append(weight.trained.register_hook(lambda grad: None if grad is None else grad * math.nan))

    def mend():
        hooks.pop().remove()
        then()

    after_step(recipe, 4, poison)
    after_step(recipe, 5, mend)


def test_an_error_after_a_skipped_step_keeps_the_bases_that_it_made(tiny_config):
    changes = {"dataset_val": None, "owlore__update_gap": 2, "owlore__resample_every": 20}
    unbroken, broken = (variant(tiny_config, name, **changes) for name in ("unbroken", "broken"))
    recipe = prepare(unbroken)
    skip_step_5(recipe, lambda: None)
    recipe.train()
    recipe.cleanup()
    assert recipe.progress.skipped_steps == 1

    def fail():
        raise torch.OutOfMemoryError("no more")

    recipe = prepare(broken)
    skip_step_5(recipe, fail)
    with pytest.raises(RunError, match="The state after step 5 is saved"):
        recipe.train()
    recipe.cleanup()
    finetune(broken | {"resume_from_checkpoint": True})
    assert_weights(broken, weights(unbroken))


def test_an_error_in_the_update_itself_saves_no_half_step(tiny_config):
    config = variant(tiny_config, "broken", dataset_val=None, save_every_n_steps=4)
    recipe = prepare(config)
    step = recipe.optimizer.step

    def half_a_step():
        if recipe.progress.step == 6:
            raise OSError("in the middle of the update")
        step()

    recipe.optimizer.step = half_a_step
    with pytest.raises(RunError, match="in the middle of the update. The newest checkpoint is .*step_4: resume with"):
        recipe.train()
    recipe.cleanup()
    assert [d.name for d in checkpoints(config)] == ["step_4"]


def test_a_bug_keeps_its_traceback_and_loses_no_step(tiny_config, capsys):
    config = variant(tiny_config, "bug", dataset_val=None)
    recipe = broken_at(config, 3, "reporting", AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        recipe.train()
    recipe.cleanup()
    assert "The state after step 3 is saved in" in capsys.readouterr().err


def test_a_signal_does_not_end_the_save_after_an_error(tiny_config, monkeypatch, capsys):
    config = variant(tiny_config, "saved", dataset_val=None)
    original = OwLoreFullFinetuneRecipe.save_checkpoint

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(OwLoreFullFinetuneRecipe, "save_checkpoint", interrupted)
    with obey_signals():
        recipe = broken_at(config, 3, "reporting", OSError("full"))
        with pytest.raises(RunError, match="full. The state after step 3 is saved in .*step_3"):
            recipe.train()
        recipe.cleanup()
    assert [d.name for d in checkpoints(config)] == ["step_3"]


def test_a_row_that_is_too_long_is_named(tiny_config, tmp_path, monkeypatch):
    """The long row is not among the rows that are checked before the run, so training finds it."""
    rows = [{"instruction": f"what is {i}?", "output": "x " * (400 if i == 31 else 1)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(samples, "MOST_ROWS", 2)
    monkeypatch.setattr(build, "longest_row", lambda dataset, max_seq_len: 100)
    config = variant(tiny_config, "long", dataset_val=None)
    config["dataset"]["data_files"] = str(tmp_path / "rows.json")
    config["owlore"]["score"] = "uniform"
    recipe = prepare(config)
    message = (
        r"rows.json: row 31 has \d+ tokens, and the model takes 256; set tokenizer.max_seq_len. The state after step "
        r"\d+ is saved in .*step_\d+: start a new run from its weights: checkpointer.checkpoint_dir=.*step_\d+, another"
    )
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()
    assert [d.name for d in checkpoints(config)] == [f"step_{recipe.progress.step}"]


def test_a_run_that_diverges_fails(tiny_config):
    """Regression: at lr=1e30 nine of ten steps were skipped, and the run succeeded with NaN in its manifest."""
    process = start(tiny_config, "optimizer.lr=1e30")
    _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and "optimizer.lr" in last
    run = Path(tiny_config["output_dir"])
    manifest = json.loads((run / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["finished"] is False
    for line in (run / "steps.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_the_last_good_checkpoint_outlives_divergence(tiny_config):
    """keep_last_n=1: an old checkpoint is removed only after a finite loss confirms the newest weights."""
    config = variant(tiny_config, "kept", save_every_n_steps=1, run_val_every_n_steps=1, keep_last_n=1)
    recipe = prepare(config)
    scale_loss(recipe, lambda: math.nan if recipe.progress.step >= 5 else 1.0)
    with pytest.raises(RunError, match="step 5, is nan: the run has diverged; .* Checkpoints in .*: step_4; a new"):
        recipe.train()
    recipe.cleanup()
    assert [d.name for d in checkpoints(config)] == ["step_4"]


def test_a_run_without_held_out_data_that_diverges_fails(tiny_config):
    config = variant(tiny_config, "blind", dataset_val=None, optimizer__lr=1e30)
    with pytest.raises(RunError, match="the run ended with . steps whose loss or gradient is not finite"):
        finetune(config)


def test_a_bad_row_of_held_out_data_is_told_in_one_line(tiny_config, tmp_path):
    rows = [{"instruction": f"what is {i}?", "output": "x " * (400 if i == 3 else 1)} for i in range(8)]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    config = variant(tiny_config, "val")
    config["dataset_val"]["data_files"] = str(tmp_path / "val.json")
    with pytest.raises(ConfigError, match=r"val.json: row 3 has \d+ tokens, and the model takes 256"):
        prepare(config)


def test_weights_that_are_not_finite_are_never_saved(tiny_config):
    config = variant(tiny_config, "inf", dataset_val=None, save_every_n_steps=2, keep_last_n=1, max_skipped_steps=1)
    recipe = prepare(config)

    @torch.no_grad()
    def spoil():
        recipe.model.layers[1].mlp.w1.weight[0, 0] = math.inf

    after_step(recipe, 5, spoil)
    message = (
        r"weights are not finite after step \d: layers.1.mlp.w1.weight; lower optimizer.lr. Checkpoints in .*: step_4;"
    )
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()
    (kept,) = checkpoints(config)
    assert kept.name == "step_4"
    assert all(weight.isfinite().all() for weight in load_file(kept / "model.safetensors").values())


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tiny_config):
    config = variant(tiny_config, "nan")
    recipe = prepare(config)
    scale_loss(recipe, lambda: 1.0 if torch.is_grad_enabled() else math.nan)
    with pytest.raises(RunError, match="the held-out loss, before, is nan: the run has diverged; lower optimizer.lr"):
        recipe.train()
    recipe.cleanup()
    manifest = (Path(config["output_dir"]) / "manifest.json").read_text()
    assert json.loads(manifest, parse_constant=pytest.fail)["held_out_loss"] == {"before": None}


PHASES = {  # phase: (interrupted object, method, newest checkpoint afterwards)
    "loading": (OwLoreFullFinetuneRecipe, "load_checkpoint", None),
    "scoring": (TrainingData, "calibration_batches", None),
    "validating": (OwLoreFullFinetuneRecipe, "validate", None),
    "a step": (LinearCrossEntropyLoss, "forward", 1),
    "saving": (OwLoreFullFinetuneRecipe, "save_checkpoint", 5),
    "finishing": (OwLoreFullFinetuneRecipe, "_finish", 10),
    "printing": (Report, "print_summary", 10),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_is_obeyed_in_every_phase(phase, number, tiny_config, monkeypatch, capsys, tmp_path):
    owner, method, step = PHASES[phase]
    original = getattr(owner, method)

    sent = []

    def interrupted(self, *args, **kwargs):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)
    config = variant(tiny_config, "signal", save_every_n_steps=5)
    config["dataset_val"] = config["dataset_val"] if phase == "validating" else None
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    monkeypatch.setattr(sys, "argv", ["tune", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as stop:
        owlore_full_finetune.recipe_main()
    assert stop.value.code == 128 + number
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith(f"{number.name}: stopped")
    expected = [] if step is None else [*(s for s in (5, 10) if s < step), step]
    assert [d.name for d in checkpoints(config)] == [f"step_{s}" for s in expected]
    monkeypatch.setattr(owner, method, original)
    if step is not None:
        finetune(config | {"resume_from_checkpoint": True})
        assert_weights(config, unbroken_weights(tiny_config, dataset_val=None))


def test_a_validation_is_left_out_after_a_signal(tiny_config, monkeypatch):
    validated = []
    monkeypatch.setattr(OwLoreFullFinetuneRecipe, "validate", lambda _, name, **_kwargs: validated.append(name))
    original = LinearCrossEntropyLoss.forward

    def interrupted(self, *args):
        if len(validated) == 3 and stop_request().signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(LinearCrossEntropyLoss, "forward", interrupted)
    config = variant(tiny_config, "signal", run_val_every_n_steps=1)
    with obey_signals(), pytest.raises(Stop):
        finetune(config)
    assert validated == ["before", "step 1", "step 2"] and [d.name for d in checkpoints(config)] == ["step_3"]
    finetune(config | {"resume_from_checkpoint": True})
    assert validated[3:] == [*(f"step {step}" for step in range(3, 10)), "after"]


def test_a_held_out_loss_that_a_resumed_run_has_is_not_measured_again(tiny_config, monkeypatch):
    config = variant(tiny_config, "saved", run_val_every_n_steps=2, save_every_n_steps=4, max_steps_per_epoch=6)
    finetune_until(config, 5)
    measured = prepare(config | {"resume_from_checkpoint": True})
    assert list(measured.report.records.losses) == ["before", "step 2", "step 4"]
    validated = []
    monkeypatch.setattr(measured, "validate", lambda name, **_kwargs: validated.append(name))
    measured.train()
    measured.cleanup()
    assert validated == ["after"]


def test_a_signal_in_the_last_save_is_obeyed(tiny_config, monkeypatch, capsys):
    """The run stops after the save, without evaluation or plots."""
    original = OwLoreFullFinetuneRecipe.save_checkpoint

    def interrupted(self):
        original(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(OwLoreFullFinetuneRecipe, "save_checkpoint", interrupted)
    monkeypatch.setattr(OwLoreFullFinetuneRecipe, "_finish", lambda self: pytest.fail("went on"))
    recipe = recipe_of(tiny_config)
    with pytest.raises(SystemExit), obey_signals():
        recipe.setup()
        recipe.train()
    recipe.cleanup()
    assert "SIGTERM: stopped after step 10, saved in" in capsys.readouterr().err


def test_a_command_is_stopped_in_one_line(monkeypatch, capsys, tiny_config, tmp_path):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(planning, "peer_plans", interrupted)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tiny_config))
    monkeypatch.setattr(sys, "argv", ["owlore", "memory", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err.strip().endswith("SIGINT: stopped")


def test_a_stop_passes_what_catches_errors():
    with pytest.raises(SystemExit), obey_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("caught")
    assert issubclass(Stop, KeyboardInterrupt)


CHANGES = {
    "dataset": lambda config, place: change_rows(config, lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]]),
    "dataset, longer": lambda config, place: change_rows(config, lambda rows: [*rows, rows[0]]),
    "dataset, shorter": lambda config, place: change_rows(config, lambda rows: rows[:-1]),
    "dataset, one letter": lambda config, place: change_rows(
        config, lambda rows: [*rows[:-1], rows[-1] | {"output": rows[-1]["output"] + "."}]
    ),
    "chat template": lambda config, place: change_json(
        place / "model" / "tokenizer_config.json", "chat_template", lambda text: text.replace("<|end|>", "<|end|> ")
    ),
    "tokenizer": lambda config, place: change_text(
        place / "model" / "tokenizer.json", lambda text: text.replace('"<|user|>"', '"<|person|>"')
    ),
    "tokenizer, a special token": lambda config, place: change_json(
        place / "model" / "tokenizer_config.json", "eos_token", lambda token: "<|system|>"
    ),
    "base weights": lambda config, place: flip_last_byte(place / "model" / "model.safetensors"),
}


def change_text(file, change):
    file.write_text(change(file.read_text()))


def change_json(file, key, change):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: change(content[key])}))


def change_rows(config, change):
    file = Path(config["dataset"]["data_files"])
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def flip_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_what_it_began_with(change, packed, tiny_config, tiny_dir, tiny_data, tmp_path):
    import shutil

    shutil.copytree(tiny_dir, tmp_path / "model")
    shutil.copy(tiny_data, tmp_path / "rows.json")
    config = variant(tiny_config, "run", dataset_val=None, max_steps_per_epoch=1, batch_size=1, epochs=2)
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    config["dataset"] |= {"data_files": str(tmp_path / "rows.json"), "packed": packed}
    config["tokenizer"]["max_seq_len"] = 64
    finetune(config)
    CHANGES[change](config, tmp_path)
    named = change.split(",")[0]
    with pytest.raises(ConfigError, match=rf"{named}.* changed since .*step_2 was saved"):
        finetune(config | {"resume_from_checkpoint": True})


def test_a_template_with_the_date_keeps_that_of_the_runs_beginning(tiny_config, tiny_dir, tmp_path):
    import shutil

    shutil.copytree(tiny_dir, tmp_path / "model")
    change_json(
        tmp_path / "model" / "tokenizer_config.json",
        "chat_template",
        lambda text: "{{ strftime_now('%H:%M:%S.%f') }}" + text,
    )
    config = variant(tiny_config, "date", dataset_val=None, save_every_n_steps=1, max_steps_per_epoch=1, batch_size=1)
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    config["dataset"]["packed"], config["tokenizer"]["max_seq_len"] = True, 64
    finetune(config)
    finetune(config | {"resume_from_checkpoint": True})


def test_the_first_step_after_a_resume_has_the_schedules_lr(tiny_config):
    schedule = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 3
    }  # fmt: skip
    config = variant(tiny_config, "lr", dataset_val=None, lr_scheduler=schedule, save_every_n_steps=4)
    recipe = finetune(config)
    rates = [step["lr"] for step in recipe.report.records.steps]
    again = finetune(config | {"resume_from_checkpoint": f"{config['output_dir']}/step_4"})
    assert [step["lr"] for step in again.report.records.steps] == rates and len(set(rates)) > 5


def test_a_foreign_checkpoint_runs_no_code(tiny_config, tmp_path):
    """Regression: torch.distributed.checkpoint metadata was a pickle. A seal does not make it trusted."""
    import pickle

    from owlore_tune.files import checksum

    finetune(tiny_config)
    (checkpoint,) = checkpoints(tiny_config)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in ("recipe_state.pt", "base/layer_0.safetensors"):
        file = checkpoint / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(Evil()))
        seal = json.loads((checkpoint / "checkpoint.json").read_text())
        seal["files"][name] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        (checkpoint / "checkpoint.json").write_text(json.dumps(seal))
        with pytest.raises(CheckpointError, match="recipe_state.pt cannot be read"):
            finetune(tiny_config | {"resume_from_checkpoint": True})
    assert not (tmp_path / "ran").exists()


def test_secrets_of_the_environment_stay_there(tiny_config, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2hunter2")
    monkeypatch.setenv("MY_MODEL", tiny_config["checkpointer"]["checkpoint_dir"])
    config = variant(tiny_config, "secret", dataset_val=None, max_steps_per_epoch=2)
    config["checkpointer"]["checkpoint_dir"] = "${oc.env:MY_MODEL}"
    config["profiler"]["output_dir"] = "${oc.env:MY_SECRET}"  # the profiler is disabled
    run = start(config)
    output, errors = run.communicate()
    assert run.returncode == 0, errors[-2000:]
    printed = output + errors
    assert "oc.env:MY_SECRET" in (Path(config["output_dir"]) / "manifest.json").read_text()
    written = b"".join(file.read_bytes() for file in Path(config["output_dir"]).rglob("*") if file.is_file())
    assert "hunter2" not in printed and b"hunter2" not in written
    finetune(config | {"resume_from_checkpoint": True})
