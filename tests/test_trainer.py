"""OwLore in the Trainer of transformers and in TRL's SFTTrainer, on SmolLM2 and on a tiny model."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from owlore_tune.config import load_config
from owlore_tune.hf import OwLoreCallback, OwLoreOptimizer
from owlore_tune.layers import outlier_scores
from owlore_tune.run.build import build_inputs
from owlore_tune.run.settings import TrainingSettings
from runs import Killed, checkpoints, finetune

ARGUMENTS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0, logging_steps=1, report_to=[],
    use_cpu=True, seed=0, lr_scheduler_type="constant", disable_tqdm=True, save_only_model=False,
)  # fmt: skip

FOR_SFT = dict(bf16=False, gradient_checkpointing=False)  # not its defaults


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
    logged = [record["active_layers"] for record in run.state.log_history if "active_layers" in record]
    assert logged == watch.active  # those that trained in the step, and not those of the next draw
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


def test_a_checkpoint_that_cannot_continue_is_refused(tiny_dir, tmp_path):
    arguments = {"max_steps": 4, "save_steps": 2}
    trainer(tiny_dir, tmp_path / "models", arguments=arguments | {"save_only_model": True}).train()
    with pytest.raises(ValueError, match="the Trainer is at step 4 and OwLoreOptimizer at 0; resume from a checkpoint"):
        trainer(tiny_dir, tmp_path / "models", arguments=arguments).train(resume_from_checkpoint=True)
    _, optimizer = build(tiny_dir)
    _, other = build(tiny_dir, resample_every=3)
    _, narrow = build(tiny_dir, rank=4)
    with pytest.raises(ValueError, match="rank=4, and the checkpoint has 8; pass the same value"):
        narrow.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="resample_every=3, and the checkpoint has 2; pass the same value"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="the checkpoint is of another optimizer"):
        other.load_state_dict(torch.optim.AdamW(other.param_groups[0]["params"]).state_dict())


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


PAGE = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
EXAMPLES = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


@pytest.mark.parametrize("code", EXAMPLES, ids=["Trainer", "TRL"])
def test_the_docs_examples_run(code, tiny_dir, tmp_path, monkeypatch):
    """With smaller numbers for a tiny model, and two steps."""
    monkeypatch.chdir(tmp_path)
    code = code.replace("num_active_layers=5", "num_active_layers=2").replace('_layers": 5', '_layers": 2')
    code = code.replace("rank=128", "rank=8").replace('"lr": 3e-4', '"lr": 3e-4, "rank": 8')
    code = code.replace("max_grad_norm=0", "max_grad_norm=0, max_steps=2, use_cpu=True, bf16=False, report_to=[]")
    code = code.replace("(model, calibration_batches)", "(model, calibration_batches, 3.0)")
    data = rows(300)
    names = {
        "directory": tiny_dir,
        "dataset": data,
        "calibration_batches": [{"input_ids": torch.tensor(data[:4]["input_ids"])}],
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / names["trainer"].args.output_dir / "checkpoint-2" / "optimizer.pt").is_file()


class InOrder:
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_on_smollm2_are_as_good_as_the_recipe(kind, smollm2_dir, tmp_path):
    """The same rows, draws and settings: 20 steps with accumulation, clipping and 10 draws, killed and resumed.

    Random sketches differ, because torchtune orders parameters in another way.
    """
    import trl

    file = tmp_path / "train.json"
    texts = [{"instruction": f"What is {i} plus {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(110)]
    file.write_text(json.dumps(texts))
    cfg = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
    cfg |= {
        "output_dir": str(tmp_path / "recipe"), "dataset_val": None, "max_steps_per_epoch": 20, "batch_size": 2,
        "dataset": {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(file)},
        "gradient_accumulation_steps": 2, "shuffle": False, "lr_scheduler": None, "clip_grad_norm": 0.5, "seed": 3,
        "device": "cpu", "dtype": "fp32", "enable_activation_checkpointing": False,
    }  # fmt: skip
    cfg["checkpointer"]["checkpoint_dir"] = str(smollm2_dir)
    cfg["owlore"] |= {"num_active_layers": 2, "resample_every": 2, "score": "uniform"}
    cfg["optimizer"] |= {"rank": 32, "lr": 1e-4, "seed": 3}
    recipe = finetune(cfg)

    tokenized = build_inputs(TrainingSettings.from_config(OmegaConf.create(cfg))).data.dataset
    samples = [tokenized[i] for i in range(len(tokenized))]
    data = Dataset.from_list([{"input_ids": sample["tokens"], "labels": sample["labels"]} for sample in samples])
    options = {key: value for key, value in cfg["optimizer"].items() if key != "_component_"}

    def build_trainer(*callbacks):
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
        optimizer = OwLoreOptimizer(
            model, [1.0] * 30, num_active_layers=2, resample_every=2, max_grad_norm=0.5, **options
        )
        watch = Watch(optimizer)
        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
        parts = {"Trainer": (Trainer, TrainingArguments, {}), "SFTTrainer": (trl.SFTTrainer, trl.SFTConfig, FOR_SFT)}
        trainer_class, config_class, more = parts[kind]
        arguments = config_class(str(tmp_path / "trainer"), max_steps=20, save_steps=8, **ARGUMENTS, **more)
        return watch, type("InOrder", (InOrder, trainer_class), {})(
            model, arguments, train_dataset=data.select(range(80)), optimizers=(optimizer, None),
            data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
            callbacks=[OwLoreCallback(optimizer), watch, *callbacks],
        )  # fmt: skip

    watch, whole = build_trainer()
    whole.train()
    assert [set(active) for active in watch.active] == watch.changed
    assert watch.active[::2] == [draw["active"] for draw in recipe._report.records.draws]
    assert len(set(watch.state_bytes[::2])) == 1
    _, broken = build_trainer(Die(13))
    with pytest.raises(Killed):
        broken.train()
    _, resumed = build_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-8"))
    assert_same_weights(whole.model, resumed.model)

    held_out = [data[i] for i in range(80, 110)]
    losses = [
        mean_loss_of(model, held_out)
        for model in (whole.model, AutoModelForCausalLM.from_pretrained(checkpoints(cfg)[-1], dtype=torch.float32))
    ]
    before = mean_loss_of(AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32), held_out)
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    assert losses[0] < 0.9 * before


@torch.no_grad()
def mean_loss_of(model, rows: list[dict]) -> float:
    model.eval()
    batches = [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in rows]
    return statistics.fmean(model(**batch).loss.item() for batch in batches)
