"""Errors, divergence and signals: remaining files, messages, and resuming."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import owlore_full_finetune
from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune import cli
from owlore_tune.checkpoints.steps import verify
from owlore_tune.data import checks as samples
from owlore_tune.data.loader import TrainingData
from owlore_tune.errors import CheckpointError, ConfigError, RunError, errors_in_one_line
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.training import components as build
from owlore_tune.training import plan as planning
from owlore_tune.training.report import Report
from owlore_tune.training.signals import Stop, obey_signals, stop_request
from runs import (
    after_step,
    assert_resumes_exactly,
    checkpoints,
    finetune,
    prepare,
    scale_loss,
    start,
    variant,
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
    "a forward pass": lambda recipe: (recipe.loss_fn, "forward"),
    "the middle of an update": lambda recipe: (recipe.optimizer, "step"),
    "a report": lambda recipe: (recipe.report, "step"),
    "a draw": lambda recipe: (recipe.report, "draw"),
}


@pytest.mark.parametrize("place", PLACES)
def test_after_an_error_the_run_goes_on_from_the_newest_checkpoint(tiny_config, place):
    config = variant(tiny_config, "broken", dataset_val=None, save_every_n_steps=4, owlore__resample_every=2)
    recipe = broken_at(config, 6, place, OSError("No space left on device"))
    with pytest.raises(RunError, match=r"No space left on device\. .*step_\d: resume with the same command and"):
        recipe.train()
    recipe.cleanup()
    assert checkpoints(config)[0].name == "step_4"
    assert_resumes_exactly(config)


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", ""], ids=["torch", "Python"])
def test_too_little_host_memory_is_told_in_one_line(tiny_config, message):
    """torch has no class of its own for it."""
    error = RuntimeError(message) if message else MemoryError()
    config = variant(tiny_config, "short", dataset_val=None, save_every_n_steps=3)
    recipe = broken_at(config, 3, "a forward pass", error)
    with pytest.raises(RunError, match="(out of|allocate) memory. .*step_3: resume with the same command"):
        recipe.train()
    recipe.cleanup()
    with pytest.raises(SystemExit, match="^error: .*(out of|allocate) memory$"), errors_in_one_line():
        raise error


def test_a_bug_keeps_its_traceback(tiny_config):
    recipe = broken_at(variant(tiny_config, "bug", dataset_val=None), 3, "a report", AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        recipe.train()
    recipe.cleanup()


def test_a_row_that_is_too_long_is_named(tiny_config, tmp_path, monkeypatch):
    """The long row is not among the rows that are checked before the run, so training finds it."""
    rows = [{"instruction": f"what is {i}?", "output": "x " * (400 if i == 31 else 1)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(samples, "MOST_ROWS", 2)
    monkeypatch.setattr(build, "longest_row", lambda dataset, max_seq_len: 100)
    config = variant(tiny_config, "long", dataset_val=None, save_every_n_steps=1)
    config["dataset"]["data_files"] = str(tmp_path / "rows.json")
    config["owlore"]["score"] = "uniform"
    recipe = prepare(config)
    message = (
        r"rows.json: row 31 has \d+ tokens, and the model takes 256; set tokenizer.max_seq_len. .*step_\d+: "
        "start a new run from its weights: checkpointer.checkpoint_dir="
    )
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()
    assert checkpoints(config)[-1].name == f"step_{recipe.progress.step}"


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
    "printing": (Report, "print_summary", 10),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_is_obeyed_in_every_phase(phase, number, tiny_config, monkeypatch, capsys, tmp_path):
    owner, method, step = PHASES[phase]
    original, sent = getattr(owner, method), []

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
    told = f"{number.name}: stopped"
    if phase in ("a step", "saving"):
        told += f" after step {step}, saved in {config['output_dir']}/step_{step}. To continue, resume with the same"
    assert errors.strip().splitlines()[-1].startswith(told)
    expected = [] if step is None else [*(s for s in (5, 10) if s < step), step]
    assert [d.name for d in checkpoints(config)] == [f"step_{s}" for s in expected]
    monkeypatch.setattr(owner, method, original)
    if step is not None:
        assert_resumes_exactly(config)


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


def test_a_full_disk_leaves_whole_checkpoints(tiny_config, small_disk, monkeypatch):
    """2 MB hold a few checkpoints. The disk seems to have space, and is full in the middle of the next save."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    run = small_disk / "run"
    config = tiny_config | {
        "output_dir": str(run), "save_every_n_steps": 1, "dataset_val": None,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
    }  # fmt: skip
    recipe = prepare(config)
    message = rf"cannot save {run}/step_\d+, which needs [\d,]+ bytes: .* The newest checkpoint is {run}/step_\d"
    with pytest.raises(RunError, match=message):
        recipe.train()
    recipe.cleanup()  # otherwise the disk cannot be unmounted
    assert recipe.progress.step < 10
    good = checkpoints(config)[-1]
    verify(good)
    AutoModelForCausalLM.from_pretrained(good)
    assert not list(run.glob("*.partial"))


CHANGES = {
    "dataset": lambda config, place: change_rows(config, lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]]),
    "dataset, longer": lambda config, place: change_rows(config, lambda rows: [*rows, rows[0]]),
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
