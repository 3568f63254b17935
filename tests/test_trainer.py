"""OwLore in the Trainer of transformers and in TRL's SFTTrainer, on SmolLM2 and on a tiny model."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from owlore_tune.hf import OwLoreCallback, OwLoreOptimizer
from owlore_tune.layers import outlier_scores
from runs import Killed

ARGUMENTS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, logging_steps=1, report_to=[],
    use_cpu=True, seed=0, lr_scheduler_type="constant", disable_tqdm=True, save_only_model=False,
)  # fmt: skip


class Die(TrainerCallback):
    """Ends the process' training like SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Watch(TrainerCallback):
    """Records active layers, the weights they change, and the size of the state."""

    def __init__(self, optimizer: OwLoreOptimizer) -> None:
        self.optimizer = optimizer
        self.active: list[list[int]] = []
        self.changed: list[set[int]] = []
        self.state_bytes: list[int] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.active.append(list(self.optimizer.active))
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        names = [name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])]
        assert all(".layers." in name for name in names)
        self.changed.append({int(name.split(".layers.")[1].split(".")[0]) for name in names})
        self.state_bytes.append(self.optimizer.state_bytes())


def rows(vocab_size: int, number: int = 80, length: int = 24) -> Dataset:
    tokens = torch.randint(2, vocab_size, (number, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def build(directory: Path, **options) -> tuple[torch.nn.Module, OwLoreOptimizer]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batches = [{"input_ids": torch.tensor(rows(300)[:4]["input_ids"])}]
    settings = {"num_active_layers": 2, "resample_every": 2, "lr": 1e-3, "rank": 8, "max_grad_norm": 0.5} | options
    return model, OwLoreOptimizer(model, outlier_scores(model, batches, 3.0), **settings)


def trainer(directory, output, callbacks=(), arguments=None, model_and_optimizer=None, **options) -> Trainer:
    model, optimizer = model_and_optimizer or build(directory, **options)
    settings = ARGUMENTS | {"max_steps": 20, "save_steps": 6} | (arguments or {})
    return Trainer(
        model, TrainingArguments(str(output), **settings), train_dataset=rows(300), optimizers=(optimizer, None),
        callbacks=[OwLoreCallback(optimizer), *callbacks],
    )  # fmt: skip


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_a_killed_run_resumes_to_the_same_bits(state, tiny_dir, tmp_path):
    whole = trainer(tiny_dir, tmp_path / "whole", inactive_state=state)
    whole.train()
    broken = trainer(tiny_dir, tmp_path / "broken", [Die(15)], inactive_state=state)
    with pytest.raises(Killed):
        broken.train()
    resumed = trainer(tiny_dir, tmp_path / "broken", inactive_state=state)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)
    last = [record for record in whole.state.log_history if "grad_norm" in record][-5:]
    again = [record for record in resumed.state.log_history if "grad_norm" in record][-5:]
    keys = ("loss", "grad_norm", "active_layers", "learning_rate", "step")
    assert [[record[key] for key in keys] for record in last] == [[record[key] for key in keys] for record in again]


def test_only_active_layers_change_and_state_does_not_grow(tiny_dir, tmp_path):
    model, optimizer = build(tiny_dir)
    watch = Watch(optimizer)
    run = trainer(tiny_dir, tmp_path / "run", [watch], model_and_optimizer=(model, optimizer))
    run.train()
    assert [set(active) for active in watch.active] == watch.changed
    assert len({tuple(active) for active in watch.active}) > 2
    before_draws = watch.state_bytes[0::2]
    assert len(before_draws) == 10 and len(set(before_draws)) == 1 and max(watch.state_bytes) == before_draws[0] > 0
    norms = [record["grad_norm"] for record in run.state.log_history if "grad_norm" in record]
    assert len(norms) == 20 and min(norms) > 0.01


def test_accumulation_and_clipping_are_those_of_larger_batches(tiny_dir, tmp_path):
    """At full rank: low-rank bases are those of the first micro-batch's gradient."""
    runs, options = [], {"rank": None, "eps": 1e-3}
    for name, batch_size, accumulation in (("two", 2, 2), ("one", 4, 1)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        runs.append(
            trainer(tiny_dir, tmp_path / name, arguments=sizes | {"max_steps": 6}, max_grad_norm=0.1, **options)
        )
        runs[-1].train()
    theirs = dict(runs[1].model.named_parameters())
    for name, parameter in runs[0].model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0)
    unclipped = trainer(tiny_dir, tmp_path / "free", arguments={"max_steps": 6}, max_grad_norm=None, **options)
    unclipped.train()
    assert any(not torch.allclose(p, theirs[name], atol=1e-5) for name, p in unclipped.model.named_parameters())


def test_a_gradient_that_is_not_finite_is_skipped(tiny_dir, caplog):
    model, optimizer = build(tiny_dir)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.arange(2, 26)[None]
    (model(input_ids=tokens, labels=tokens).loss * math.nan).backward()
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.num_steps == 2


def test_the_trainer_can_create_the_optimizer(tiny_dir, tmp_path):
    model, optimizer = build(tiny_dir)
    settings = {"model": model, "scores": [1.0, 1.0, 1.0, 1.0], "num_active_layers": 1, "resample_every": 3, "rank": 4}
    arguments = TrainingArguments(str(tmp_path), max_steps=4, save_strategy="no", **ARGUMENTS)
    run = Trainer(
        model, arguments, train_dataset=rows(300), callbacks=[OwLoreCallback()],
        optimizer_cls_and_kwargs=(OwLoreOptimizer, settings | {"lr": 1e-3}),
    )  # fmt: skip
    run.train()
    assert len(run.state.log_history[0]["active_layers"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0; the Trainer cannot clip projected gradients: set it to 0"),
    ],
)
def test_settings_that_would_train_something_else_are_refused(arguments, message, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_dir, tmp_path, arguments=arguments).train()
    model, _ = build(tiny_dir)
    plain = TrainingArguments(str(tmp_path), max_steps=1, **ARGUMENTS)
    with pytest.raises(ValueError, match="the Trainer's optimizer is AdamW; pass optimizers="):
        Trainer(model, plain, train_dataset=rows(300), callbacks=[OwLoreCallback()]).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0}, "max_grad_norm=0; it must be above 0, or None"),
        ({"num_active_layers": 9}, "9"),
        ({"resample_every": 0}, "resample_every=0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message, tiny_dir):
    with pytest.raises(ValueError, match=message):
        build(tiny_dir, **options)


@pytest.mark.slow
def test_sfttrainer_on_smollm2_is_killed_and_resumed(smollm2_dir, tmp_path):
    """20 steps with accumulation and clipping."""
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": [f"What is {i} plus {i}? It is {2 * i}." for i in range(80)]})

    def sft(output, *callbacks):
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
        optimizer = OwLoreOptimizer(model, [1.0] * 30, num_active_layers=2, resample_every=4, lr=1e-3, rank=32)
        config = SFTConfig(str(output), max_steps=20, save_steps=8, max_length=32, bf16=False, **ARGUMENTS)
        return SFTTrainer(
            model, config, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(smollm2_dir),
            optimizers=(optimizer, None), callbacks=[OwLoreCallback(optimizer), *callbacks],
        )  # fmt: skip

    whole = sft(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        sft(tmp_path / "broken", Die(19)).train()
    resumed = sft(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)
    losses = [record["loss"] for record in whole.state.log_history if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]
