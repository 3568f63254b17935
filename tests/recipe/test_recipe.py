"""The recipe end to end on a tiny model, and its parts in Python as in the docs."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from forks import Command, run_command
from near import assert_same_shares
from omegaconf import OmegaConf
from reference import outlier_scores
from transformers import AutoModelForCausalLM

from owlore_tune.layers.scores import Outlier
from owlore_tune.training.records import read_records
from runs import assert_weights, changed_by_draw, checkpoints, finetune, prepare, read_weights, variant, weights

COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2,
}  # fmt: skip


def test_a_run_by_name_from_another_directory(tiny_config, tmp_path):
    """`tune run` in a subprocess. All output files exist and agree."""
    tiny_config["save_every_n_steps"] = 3
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tiny_config))
    command = ["tune", "run", "owlore_full_finetune", "--config", "config.yaml", "optimizer.lr=1e-2"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["steps"] == 10
    assert manifest["checkpoint"] == "step_10"
    assert manifest["held_out_loss"]["after"] < manifest["held_out_loss"]["before"]
    assert manifest["config"]["optimizer"]["lr"] == 1e-2
    assert {"torchtune", "torch", "torchao", "owlore-tune"} <= manifest["versions"].keys()
    assert manifest["memory_bytes"]["measured"]["total"] > 10**8
    assert [draw["step"] for draw in manifest["draws"]] == [0, 3, 6, 9]
    assert changed_by_draw(tiny_config) == [(draw["active"], []) for draw in manifest["draws"]]
    for draw in manifest["draws"]:
        assert len(draw["active"]) == 2
        assert draw["moved"] == draw["active"]
        assert draw["refresh_seconds"] > 0
    assert [json.loads(line) for line in (run / "draws.jsonl").read_text().splitlines()] == manifest["draws"]
    assert "held-out loss   before" in result.stdout
    for name in ("scores.png", "draws.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    logged = "".join(file.read_text() for file in (run / "logs").iterdir())
    for metric in ("loss", "lr", "grad_norm", "tokens_per_second", "trained_tokens_per_second", "optimizer_state_gb"):
        assert f"{metric}:" in logged
    ids = torch.arange(12)[None]
    exported = AutoModelForCausalLM.from_pretrained(run / "step_10")
    before = AutoModelForCausalLM.from_pretrained(tiny_config["checkpointer"]["checkpoint_dir"])
    assert not torch.allclose(exported(ids).logits, before(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_activation_checkpointing": True},
        {"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}},
        {"loss": {"_component_": "torch.nn.CrossEntropyLoss"}},
    ],
    ids=["checkpointing", "chunked loss", "plain loss"],
)
def test_how_it_is_computed_changes_nothing(tiny_config, changes):
    assert_near(tiny_config, variant(tiny_config, "other", **changes), 2e-5)


def assert_near(one: dict, other: dict, atol: float) -> None:
    """Train by both configs, and compare the final weights."""
    finetune(one), finetune(other)
    expected, got = weights(one), weights(other)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, atol=atol, rtol=0, msg=name)


def test_accumulated_micro_batches_train_like_one_batch(tiny_config):
    full = variant(tiny_config, "full", owlore__rank=None, batch_size=8)
    split = variant(full, "split", batch_size=2, gradient_accumulation_steps=4)
    assert_near(full, split, 2e-5)
    assert checkpoints(full)[-1].name == checkpoints(split)[-1].name == "step_5"


def test_the_same_seed_gives_the_same_bits(tiny_config):
    first, again, other = (variant(tiny_config, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for config in (first, again, other):
        finetune(config)
    assert_weights(again, weights(first))
    assert not all(torch.equal(weight, weights(other)[name]) for name, weight in weights(first).items())


@pytest.mark.parametrize(
    ("changes", "num_changed"),
    [
        ({"owlore__num_active_layers": None, "owlore__rank": None, "owlore__score": "uniform"}, 4),
        ({"owlore__num_active_layers": None, "owlore__score": "uniform"}, 4),
        ({"owlore__rank": None, "owlore__score": "uniform"}, 2),
    ],
    ids=["full", "galore", "lisa"],
)
def test_other_methods_are_settings(tiny_config, changes, num_changed):
    config = variant(tiny_config, "method", save_every_n_steps=3, **changes)
    recipe = finetune(config)
    assert changed_by_draw(config) == [(draw["active"], []) for draw in recipe.report.records.draws]
    assert all(len(draw["active"]) == num_changed for draw in recipe.report.records.draws)


def test_bf16_packed_with_everything_trained(tiny_config):
    config = variant(
        tiny_config, "bf16", dtype="bf16", batch_size=2, owlore__train_embeddings=True, owlore__train_output=True,
        owlore__train_norm=True, owlore__draw="bernoulli", optimizer__lr=2e-3,
        owlore__inactive_state="offload", owlore__moments="project", owlore__update_gap=2, save_every_n_steps=3,
    )  # fmt: skip
    config["tokenizer"]["max_seq_len"] = 64
    for key in ("dataset", "dataset_val"):
        config[key]["packed"] = True
    finetune(config)
    _, outside = changed_by_draw(config)[-1]
    assert outside == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert weights(config)["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_layers_train_alike(tiny_config):
    assert_near(tiny_config, variant(tiny_config, "compiled", compile=True), 1e-4)


def test_several_datasets_are_chained(tiny_config):
    config = variant(tiny_config, "two", dataset=[tiny_config["dataset"]] * 2)
    assert finetune(config).progress.step == 20


def test_validation_schedule_profiler_and_tensorboard(tiny_config):
    pytest.importorskip("tensorboard")
    output = tiny_config["output_dir"]
    config = variant(
        tiny_config, "extras", run_val_every_n_steps=4, owlore__score="heavy_tail",
        metric_logger={
            "_component_": "torchtune.training.metric_logging.TensorBoardLogger", "log_dir": f"{output}/tensorboard"
        },
        lr_scheduler=COSINE,
        profiler={
            "_component_": "torchtune.training.setup_torch_profiler", "enabled": True, "cuda": False, "xpu": False,
            "wait_steps": 1, "warmup_steps": 1, "active_steps": 2, "num_cycles": 1, "output_dir": f"{output}/traces",
        },
    )  # fmt: skip
    recipe = finetune(config)
    assert list(recipe.report.records.losses) == ["before", "step 4", "step 8", "after"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    (events,) = Path(f"{output}/tensorboard").rglob("events.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    for name in ("loss", "lr", "grad_norm", "backward_seconds", "tokens_per_second", "peak_memory_gb"):
        values = [make_ndarray(event.tensor_proto).item() for event in shown.Tensors(name)]
        assert values == pytest.approx([step[name] for step in read_records(recipe.run.path / "steps.jsonl")], rel=1e-6)
    assert [event.step for event in shown.Tensors("val_loss")] == [0, 4, 8, 10]
    assert list(Path(f"{output}/traces").rglob("*.json*"))


def test_a_score_file_of_this_model_is_used(tiny_config):
    finetune(tiny_config)
    file = Path(tiny_config["output_dir"]) / "scores.json"
    scores = json.loads(file.read_text())
    scores["scores"] = [0.0, 1.0, 0.0, 1.0]
    file.write_text(json.dumps(scores))
    other = variant(tiny_config, "reused", owlore__scores_file=str(file))
    recipe = finetune(other)
    assert all(draw["active"] == [1, 3] for draw in recipe.report.records.draws)


def test_a_draw_that_changes_nothing_is_reported(tiny_config, caplog):
    recipe = finetune(variant(tiny_config, "still", optimizer__lr=0.0))
    assert all(draw["moved"] == [] for draw in recipe.report.records.draws)
    assert "did not change in the draw of step 0: its steps were skipped, or the updates were 0" in caplog.text


def with_long_prompts(config: dict, which: Iterable[int], number: int = 40) -> str:
    """Write the first rows of the data, some of which are cut off before their answers, and return the file."""
    rows = json.loads(Path(config["dataset"]["data_files"]).read_text())[:number]
    for i in which:
        rows[i]["instruction"] *= 50
    file = Path(config["output_dir"]).with_name("long.json")
    file.write_text(json.dumps(rows))
    return str(file)


def test_samples_without_trained_tokens_do_not_poison_the_step(tiny_config):
    """A prompt longer than max_seq_len leaves no trained tokens; their mean would be NaN."""
    changes = {"dataset__data_files": with_long_prompts(tiny_config, range(0, 40, 2)), "tokenizer__max_seq_len": 64}
    config = variant(tiny_config, "short", batch_size=1, gradient_accumulation_steps=4, **changes)
    recipe = finetune(config)
    assert recipe.progress.skipped_steps == 0
    assert all(weight.isfinite().all() for weight in weights(config).values())


def test_a_step_without_trained_tokens_has_no_loss(tiny_config):
    data = with_long_prompts(tiny_config, [1], number=4)
    changes = {"dataset__data_files": data, "tokenizer__max_seq_len": 64, "batch_size": 1, "shuffle": False}
    recipe = finetune(variant(tiny_config, "cut", **changes, dataset_val=None))
    steps = read_records(recipe.run.path / "steps.jsonl")
    assert [step["loss"] is None for step in steps] == [False, True, False, False]
    assert recipe.progress.skipped_steps == 0


def test_the_held_out_loss_is_that_of_transformers(tiny_config, tiny_dir):
    """Over rows that fill no whole number of batches, one of which is cut off before its answer."""
    data = with_long_prompts(tiny_config, [4], number=10)
    changes = {"dataset_val__data_files": data, "tokenizer__max_seq_len": 64}
    losses = []
    for size in (1, 3):
        recipe = prepare(variant(tiny_config, f"val_{size}", **changes, batch_size_val=size))
        recipe.validate("now")
        losses.append(recipe.report.records.losses["now"])
        recipe.cleanup()
    model, total, count = AutoModelForCausalLM.from_pretrained(tiny_dir), 0.0, 0
    dataset = recipe.inputs.held_out.dataset
    for tokens, labels in ((torch.tensor([row[key]]) for key in ("tokens", "labels")) for row in dataset):
        if trained := int((labels[:, 1:] != -100).sum()):
            total += model(tokens, labels=labels).loss.item() * trained
            count += trained
    assert len(dataset) == 10 and losses == pytest.approx([total / count] * 2, abs=1e-4)


def test_scores_are_those_of_the_first_batches_without_padding(tiny_config):
    rows = [{"instruction": "what " * length, "output": "so " * length} for length in (1, 30, 2, 20) * 5]
    data = Path(tiny_config["output_dir"]).with_name("lengths.json")
    data.write_text(json.dumps(rows))
    changes = {"dataset__data_files": str(data), "shuffle": False, "dataset_val": None, "batch_size": 2}
    recipe = prepare(variant(tiny_config, "scored", **changes, owlore__calibration_batches=2))
    recipe.cleanup()
    batches = [{"tokens": torch.tensor([recipe.inputs.data.dataset[i]["tokens"]])} for i in range(4)]
    wanted = outlier_scores(recipe.model, batches, threshold=3.0)
    assert_same_shares(recipe.scores.scores, wanted, recipe.model)
    with pytest.raises(AssertionError):
        assert_same_shares(recipe.scores.scores, outlier_scores(recipe.model, batches[:2], threshold=3.0), recipe.model)


def test_the_fields_of_owlore_reach_the_schedule(tiny_config):
    fields = {
        "num_active_layers": 3, "resample_every": 5, "draw": "sequential", "rank": 4, "side": "shape", "scale": 0.5,
        "basis": "svd", "update_gap": 7, "moments": "project", "inactive_state": "offload",
    }  # fmt: skip
    recipe = prepare(tiny_config | {"owlore": tiny_config["owlore"] | fields, "seed": 3})
    recipe.cleanup()
    found = recipe.schedule.state_dict()["settings"]
    assert found.items() >= {key: value for key, value in fields.items() if key != "num_active_layers"}.items()
    assert sum(found["probabilities"]) == pytest.approx(3) and found["seed"] == 3


def test_clipping_shortens_the_steps(tiny_config):
    def movement(name: str, limit: float | None) -> float:
        config = variant(tiny_config, name, clip_grad_norm=limit, optimizer__eps=1e-2, dataset_val=None)
        finetune(config)
        start = read_weights(Path(config["checkpointer"]["checkpoint_dir"]))
        return sum((weight - start[key]).abs().sum().item() for key, weight in weights(config).items())

    assert 0 < movement("clipped", 1e-4) < 0.1 * movement("free", None)


def test_the_schedule_ends_with_the_run(tiny_config):
    config = variant(tiny_config, "cosine", lr_scheduler=COSINE, dataset_val=None)
    finetune(config)
    rates = [step["lr"] for step in read_records(Path(config["output_dir"]) / "steps.jsonl")]
    peak = config["optimizer"]["lr"]
    assert len(rates) == 10 and max(rates) == pytest.approx(peak) and rates[-1] < 0.05 * peak


def test_activation_checkpointing_wraps_the_layers(tiny_config):
    for wanted in (True, False):
        recipe = prepare(variant(tiny_config, f"checkpointing_{wanted}", enable_activation_checkpointing=wanted))
        assert all(hasattr(layer, "_checkpoint_wrapped_module") == wanted for layer in recipe.model.layers)


def test_every_epoch_has_another_order(tiny_config):
    data, epochs = prepare(variant(tiny_config, "epochs", epochs=2)).inputs.data, []
    for _ in range(2):
        rows = [row for _ in range(10) for batch in data.micro_batches() for row in batch["tokens"].tolist()]
        epochs.append([[token for token in row if token] for row in rows])  # without padding
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_a_run_too_short_for_its_schedules_logs_warnings(tiny_config, caplog):
    prepare(variant(tiny_config, "short", lr_scheduler=COSINE, max_steps_per_epoch=2))
    assert "num_warmup_steps=2, and the run has 2 steps, so the learning rate never reaches" in caplog.text
    assert "resample_every=3, and the run has 2 steps, so only the first draw, 2 of 4 layers, trains" in caplog.text
    caplog.clear()
    prepare(variant(tiny_config, "longer", lr_scheduler=COSINE, max_steps_per_epoch=4))
    all_layers = {"owlore__num_active_layers": None, "owlore__score": "uniform"}
    prepare(variant(tiny_config, "all", max_steps_per_epoch=3, **all_layers))
    assert "and the run has" not in caplog.text


def test_nothing_keeps_the_weights_of_a_run_in_memory(tiny_config):
    """Regression: hooks of the memory plan did, so processes with several runs grew by a model for each."""
    recipe = finetune(tiny_config)
    weight = weakref.ref(recipe.model.layers[0].attn.q_proj.weight)
    del recipe
    gc.collect()
    assert weight() is None


PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
PYTHON_EXAMPLES = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


def test_the_docs_training_example_runs(tokens):
    """The docs' code with a tiny model, and smaller numbers because a tiny model has few outliers."""
    from tiny import tiny_llama

    (code,) = [example for example in PYTHON_EXAMPLES if "optimizer = " in example]
    for large, small in (("rank=128", "rank=8"), ("num_active=5", "num_active=2"), ('"outlier"', "Outlier(3.0)")):
        code = code.replace(large, small)
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def loss(model, batch):
        return model(batch).logsumexp(-1).mean()

    names = {"Outlier": Outlier, "model": model, "calibration_batches": [{"tokens": tokens}]}
    names |= {"batches": [tokens] * 3, "loss": loss}
    exec(code, names)
    changed = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 2


def test_the_docs_transformers_example_runs(smollm2_dir, capsys):
    (code,) = [example for example in PYTHON_EXAMPLES if "transformers" in example]
    exec(code.replace("runs/demo/step_40", str(smollm2_dir)), {})
    assert capsys.readouterr().out.strip().endswith("The capital of France is Paris.")


def test_torchtunes_generate_runs_on_a_checkpoint(smollm2_dir, tmp_path):
    """torchtune's recipe with the docs' config, in a process of its own. Greedy text equals that of transformers."""
    run_command("owlore", "cp", "smollm2/135M_generate", "g.yaml", cwd=tmp_path)
    words = ("tune", "run", "generate", "--config", "g.yaml", f"checkpointer.checkpoint_dir={smollm2_dir}")
    command = Command(*words, cwd=tmp_path)
    printed = "".join(command.communicate())
    assert command.returncode == 0 and "The capital of France is Paris." in printed, printed[-2000:]
