"""OwLore in the Trainer of transformers and in TRL's SFTTrainer, on SmolLM2 and on a tiny model."""

import json
from pathlib import Path
from types import SimpleNamespace

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

from owlore_tune.config.load import load_config
from owlore_tune.layers import LayerSampler, Outlier, ProjectedLayers, Schedule, layer_scores
from owlore_tune.optim.moments import state_bytes
from owlore_tune.trainer import OwLoreCallback, quantize_layers
from owlore_tune.training.components import build_inputs
from owlore_tune.training.config import TrainingSettings
from runs import Killed, checkpoints, finetune

ARGUMENTS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=1, report_to=[],
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
    """Records active layers, and the layers whose weights a step changes."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.active: list[list[int]] = []
        self.sizes: set[int] = set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.active.append(list(self.schedule.active))
        self.before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert layers_of_changes(self.before, model) == set(self.active[-1])
        self.sizes.add(state_bytes(self.schedule.optimizer) + self.schedule.layers.nbytes())


def layers_of_changes(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[int]:
    """The layers of ``model`` with other weights than ``before``; all weights elsewhere must be the same."""
    names = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def rows(vocab_size: int, number: int = 80, length: int = 24) -> Dataset:
    tokens = torch.randint(2, vocab_size, (number, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def build(directory: Path, store: Path | None = None, kind: str = "int8", rank: int = 8, **options):
    """A model and a schedule; its layers are quantized if there is a ``store``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batches = [{"input_ids": torch.tensor(rows(300)[:4]["input_ids"])}]
    scores = layer_scores(model, Outlier(3.0), batches)
    layers = ProjectedLayers(model, rank=rank)
    optimizer = options.pop("optimizer", torch.optim.AdamW)(layers.parameter_groups(), lr=1e-3, weight_decay=0.01)
    if store is not None:
        layers.quantized = quantize_layers(model, kind, store, products="int8" if kind == "int8" else "full")
    schedule = Schedule(layers, optimizer, LayerSampler(scores, 2), **{"resample_every": 2} | options)
    return model, schedule


def trainer(directory, output, callbacks=(), model_and_schedule=None, arguments=None, **options) -> Trainer:
    model, schedule = model_and_schedule or build(directory, **options)
    settings = ARGUMENTS | {"max_steps": 20, "save_steps": 6} | (arguments or {})
    return Trainer(
        model, TrainingArguments(str(output), **settings), train_dataset=rows(300), eval_dataset=rows(300, 4),
        optimizers=(schedule.optimizer, None), callbacks=[OwLoreCallback(model, schedule), *callbacks],
    )  # fmt: skip


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


class Own(torch.optim.AdamW):
    """An optimizer that loads without hooks, as those of bitsandbytes do."""

    def load_state_dict(self, state_dict):
        hooks, self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_pre_hooks, {}
        super().load_state_dict(state_dict)
        self._optimizer_load_state_dict_pre_hooks = hooks


@pytest.mark.parametrize(
    "options",
    [
        {"inactive_state": "drop"},
        {"inactive_state": "keep"},
        {"inactive_state": "offload", "update_gap": 3},
        {"optimizer": Own},
        {"kind": "int8"},
        {"kind": "nf4"},
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_bits(options, tiny_dir, tmp_path):
    def start(name: str, *callbacks: TrainerCallback) -> Trainer:
        stores = {"store": tmp_path / f"store_{len(list(tmp_path.iterdir()))}"} if "kind" in options else {}
        return trainer(tiny_dir, tmp_path / name, callbacks, **options, **stores)

    whole = start("whole")
    whole.train()
    with pytest.raises(Killed):
        start("broken", Die(15)).train()
    resumed = start("broken")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)
    keys = ("loss", "grad_norm", "active_layers", "learning_rate", "step")
    last, again = (
        [[record[key] for key in keys] for record in run.state.log_history if "grad_norm" in record][-5:]
        for run in (whole, resumed)
    )
    assert last == again


@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
def test_a_saved_model_has_full_precision_weights_and_the_updates(kind, tiny_dir, tmp_path):
    options = {} if kind == "full" else {"store": tmp_path / "store", "kind": kind}
    run = trainer(tiny_dir, tmp_path / "run", arguments={"max_steps": 6}, **options)
    run.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).state_dict()
    trained = {layer for record in run.state.log_history for layer in record.get("active_layers", ())}
    assert layers_of_changes(before, saved) == trained
    for name, weight in run.model.state_dict().items():  # merged at the end
        torch.testing.assert_close(weight, saved.state_dict()[name], atol=1e-6, rtol=1e-6)
    assert run.model.state_dict().keys() == before.keys()


def test_only_active_layers_change_and_state_does_not_grow(tiny_dir, tmp_path):
    parts = build(tiny_dir)
    watch = Watch(parts[1])
    run = trainer(tiny_dir, tmp_path / "run", [watch], parts)
    run.train()
    assert len({*map(tuple, watch.active)}) > 2 and len(watch.sizes) == 1 and min(watch.sizes) > 0
    records = [record for record in run.state.log_history if "grad_norm" in record]
    assert [record["active_layers"] for record in records] == watch.active
    assert len(records) == 20 and min(record["grad_norm"] for record in records) > 0.01


def test_the_trainer_clips_projected_gradients(tiny_dir, tmp_path):
    """SGD moves by the gradient, so the updates of a step are as long as the limit."""
    model, schedule = build(tiny_dir, optimizer=lambda groups, **options: torch.optim.SGD(groups, lr=1.0))
    lengths = []

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            parts = [weight.trained.detach().square().sum() for _, weight in schedule.layers.active_weights()]
            lengths.append(torch.stack(parts).sum().sqrt().item())

    arguments = {"max_steps": 1, "max_grad_norm": 1e-3, "save_strategy": "no"}
    run = trainer(tiny_dir, tmp_path, [Measure()], (model, schedule), arguments)
    run.train()
    assert 0.9e-3 < lengths[0] <= 1.001e-3
    assert run.state.log_history[0]["grad_norm"] > 0.1


def test_bf16_trains_in_autocast(tiny_dir, tmp_path):
    losses = []
    for bf16 in (False, True):
        run = trainer(tiny_dir, tmp_path / str(bf16), arguments={"bf16": bf16, "max_steps": 8})
        run.train()
        losses.append([record["loss"] for record in run.state.log_history if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[1] != losses[0]


def test_the_trainer_can_load_the_best_weights_at_its_end(tiny_dir, tmp_path):
    """Without the updates of the last steps, which are not theirs."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(tiny_dir, tmp_path, arguments={"max_steps": 6, "save_steps": 2, **often})
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint, dtype=torch.float32)
    assert_same_weights(best, run.model)


def test_settings_that_would_train_something_else_are_refused(tiny_dir, tmp_path):
    model, schedule = build(tiny_dir)
    run = trainer(tiny_dir, tmp_path, model_and_schedule=(model, schedule))
    with pytest.raises(ValueError, match="this model already has a callback; pass that one, or load the model anew"):
        OwLoreCallback(model, schedule)
    (callback,) = (each for each in run.callback_handler.callbacks if isinstance(each, OwLoreCallback))
    one, several = (SimpleNamespace(world_size=ranks, n_gpu=1) for ranks in (1, 2))
    adapted, other = torch.nn.Sequential(model), torch.optim.AdamW(model.parameters())
    for args, of_model, optimizer, message in (
        (one, adapted, schedule.optimizer, "the Trainer's model is another Sequential than the callback's"),
        (one, model, other, "the Trainer's optimizer is another AdamW; pass optimizers="),
        (several, model, schedule.optimizer, "the Trainer has several devices, and their layers would differ"),
    ):
        with pytest.raises(ValueError, match=message):
            callback.on_train_begin(args, run.state, run.control, model=of_model, optimizer=optimizer)


def test_a_checkpoint_without_the_state_of_the_optimizer_is_refused(tiny_dir, tmp_path):
    arguments = {"max_steps": 4, "save_steps": 2}
    trainer(tiny_dir, tmp_path, arguments=arguments | {"save_only_model": True}).train()
    with pytest.raises(ValueError, match="the Trainer is at step 4 and the schedule at 0; resume from a checkpoint"):
        trainer(tiny_dir, tmp_path, arguments=arguments).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"rank": 4}, {}, "rank=4, and the checkpoint has 8; pass the same value"),
        ({"resample_every": 3}, {}, "resample_every=3, and the checkpoint has 2; pass the same value"),
        ({"kind": "int8"}, {}, "weights={'kind': 'int8', .*, and the checkpoint has None; pass the same"),
        ({}, {"kind": "int8"}, "weights=None, and the checkpoint has {'kind': 'int8'"),
        ({"kind": "nf4"}, {"kind": "int8"}, "weights={'kind': 'nf4', .*, and the checkpoint has {'kind': 'int8'"),
        ({}, None, "the checkpoint is of another optimizer"),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(ours, theirs, message, tiny_dir, tmp_path):
    optimizers = []
    for number, options in enumerate((ours, theirs or {})):
        stores = {"store": tmp_path / str(number)} if "kind" in options else {}
        model, schedule = build(tiny_dir, **options, **stores)
        OwLoreCallback(model, schedule)
        optimizers.append(schedule.optimizer)
    state = optimizers[1].state_dict()
    if theirs is None:
        state.pop("owlore")
    with pytest.raises(ValueError, match=message):
        optimizers[0].load_state_dict(state)


def test_an_existing_directory_gets_no_weights(tiny_dir, tmp_path):
    with pytest.raises(FileExistsError):
        build(tiny_dir, tmp_path)


PAGE = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
EXAMPLES = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


@pytest.mark.parametrize("code", EXAMPLES, ids=["Trainer", "TRL"])
def test_the_docs_examples_run(code, tiny_dir, tmp_path, monkeypatch):
    """With smaller numbers for a tiny model, and two steps."""
    monkeypatch.chdir(tmp_path)
    code = code.replace("num_active=5", "num_active=2").replace("rank=128", "rank=8")
    code = code.replace('("runs/', '(max_steps=2, use_cpu=True, bf16=False, report_to=[], output_dir="runs/')
    code = code.replace('"outlier"', "Outlier(3.0)")
    data = rows(300)
    names = {
        "Outlier": Outlier,
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


def recipe_config(weights: str, smollm2_dir: Path, directory: Path) -> dict:
    """6 steps with accumulation, clipping and 3 draws."""
    file = directory / "train.json"
    texts = [{"instruction": f"What is {i} plus {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(40)]
    file.write_text(json.dumps(texts))
    cfg = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
    cfg |= {
        "output_dir": str(directory / "recipe"), "dataset_val": None, "max_steps_per_epoch": 6, "batch_size": 2,
        "dataset": {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(file)},
        "gradient_accumulation_steps": 2, "shuffle": False, "lr_scheduler": None, "clip_grad_norm": 0.5, "seed": 3,
        "device": "cpu", "dtype": "fp32", "enable_activation_checkpointing": False,
    }  # fmt: skip
    cfg["checkpointer"]["checkpoint_dir"] = str(smollm2_dir)
    cfg["owlore"] |= {"num_active_layers": 2, "resample_every": 2, "score": "uniform", "rank": 32, "weights": weights}
    cfg["optimizer"]["lr"] = 2e-4
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kinds"), [("full", ["Trainer", "SFTTrainer"]), ("int8", ["Trainer"])])
def test_trainers_on_smollm2_are_as_good_as_the_recipe(weights, kinds, smollm2_dir, tmp_path):
    """The same rows, draws and settings.

    Random sketches differ, because torchtune has other names of weights. Products are in full precision: with int8
    products, differences of 1e-6 between the two decoders move inputs to the next of 255 values, and losses by 1 %.
    """
    import trl

    cfg = recipe_config(weights, smollm2_dir, tmp_path)
    draws = [draw["active"] for draw in finetune(cfg).report.records.draws]

    tokenized = build_inputs(TrainingSettings.from_config(OmegaConf.create(cfg))).data.dataset
    samples = [tokenized[i] for i in range(len(tokenized))]
    data = Dataset.from_list([{"input_ids": sample["tokens"], "labels": sample["labels"]} for sample in samples])
    options = {key: value for key, value in cfg["optimizer"].items() if key != "_component_"}
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)

    def train(kind):
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
        layers = ProjectedLayers(model, rank=32, seed=3)
        optimizer = torch.optim.AdamW(layers.parameter_groups(), **options)
        if weights != "full":
            layers.quantized = quantize_layers(model, weights, tmp_path / "store")
        schedule = Schedule(layers, optimizer, LayerSampler([1.0] * 30, 2, seed=3), resample_every=2)
        parts = {"Trainer": (Trainer, TrainingArguments, {}), "SFTTrainer": (trl.SFTTrainer, trl.SFTConfig, FOR_SFT)}
        trainer_class, config_class, more = parts[kind]
        run = type("InOrder", (InOrder, trainer_class), {})(
            model, config_class(str(tmp_path / kind), max_steps=6, **ARGUMENTS, **more),
            train_dataset=data.select(range(30)), optimizers=(optimizer, None), processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[OwLoreCallback(model, schedule)],
        )  # fmt: skip
        run.train()
        active = [record["active_layers"] for record in run.state.log_history if "active_layers" in record]
        assert active[::2] == draws
        return tmp_path / kind / "checkpoint-6"

    held_out = [data[i] for i in range(30, 40)]
    before, expected = (mean_loss_of(directory, held_out) for directory in (smollm2_dir, checkpoints(cfg)[-1]))
    for kind in kinds:
        loss = mean_loss_of(train(kind), held_out)
        assert loss == pytest.approx(expected, rel=0.005), kind
        assert loss < 0.9 * before, kind


@torch.no_grad()
def mean_loss_of(directory: Path, rows: list[dict]) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(directory))(rows)
    return model(**batch).loss.item()
