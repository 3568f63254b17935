"""Wrong overrides: a one-line error names the value before weights are loaded. Right ones are accepted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from places import nonempty, refused, rewrite

import owlore_eval
import owlore_full_finetune
from owlore_tune import cli
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.config.schema import COUNT, POSITIVE, Range, check_type
from owlore_tune.errors import ConfigError
from runs import recipe_of

# One row for each kind of check: overrides, separated by spaces, and a part of the error. What other packages say is
# not part of it.
OVERRIDES = {
    # Syntax
    "batch_size": "override 'batch_size' is not of the form field=value",
    "batch_size=[1": "overrides batch_size=[1: ",
    "batch_size=${nope}": "full_key: batch_size",
    "--batch_size": "unrecognized arguments: --batch_size; override a field with field=value",
    # Keys
    "learning_rate=1": "unknown key learning_rate; known keys are batch_size, batch_size_val, checkpointer, ",
    "owlore.rnk=2": "unknown key owlore.rnk; did you mean rank?",
    "dataset.packd=true": "unknown key dataset.packd; did you mean packed?; or remove it with ~dataset.packd",
    "~owlore": "missing in the config: owlore",
    "loss=null": "loss=null; the run needs one",
    # Components
    "optimizer=math.pi": "optimizer._component_=math.pi is a float, which cannot be called",
    "optimizer=nope.nope": "optimizer._component_=nope.nope: ",
    "~lr_scheduler.num_warmup_steps": " of torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "lr_scheduler.num_warmup_steps=0 lr_scheduler.num_cycles=.inf": "'num_cycles': inf}: ",
    "optimizer.betas=5": "(with fused=True, lr=0.001, betas=5",
    "optimizer.lr=.inf": "optimizer.lr=inf; it must be a finite number",
    "optimizer=torch.optim.Adam optimizer.weight_decay=0.1": "that of Adam is not known to be decoupled",
    "tokenizer=torch.nn.Identity": "torch.nn.Identity is not a valid tokenizer: it has no pad_id",
    "loss=torch.nn.Identity": "torch.nn.Identity is not a valid loss: it has no ignore_index",
    "metric_logger=torch.nn.Identity": "torch.nn.Identity is not a valid metric_logger: it has no log_dict",
    "checkpointer=torch.nn.Identity": "; this recipe needs owlore_tune.checkpoints.HFCheckpointer",
    "collate_fn=nope.nope": "collate_fn=nope.nope: ",
    "collate_fn=torchtune.data.left_pad_sequence": "pads on the left",
    "collate_fn=json.dumps": "collate_fn=json.dumps cannot make a batch of dataset's samples: TypeError(",
    "loss.chunk_size=1.5": "loss.chunk_size=1.5; it must be at least 1 position",
    "loss=torchtune.modules.loss.CEWithChunkedOutputLoss loss.num_output_chunks=0": "=0; it must be a whole number of",
    # Types and ranges
    "batch_size=two": "batch_size='two'; it must be int",
    "model.norm_eps=.nan": "model.norm_eps=nan; it must be a number",
    "output_dir=~nosuchuser/x": "~nosuchuser/x: there is no user nosuchuser",
    "output_dir=''": "output_dir is empty; name a directory",
    "owlore.score=outliers": "owlore.score=outliers; choose one of outlier",
    "owlore.products=int8 owlore.weights=nf4": "owlore.products=int8 needs owlore.weights=int8, not nf4",
    "owlore.draw=bernoulli device_memory_limit=20": "device_memory_limit cannot be guaranteed with owlore.draw=bern",
    "owlore.weights=int8 fsdp=true": "fsdp=true; owlore.weights=int8 cannot be sharded: leave fsdp out",
    "fsdp_cpu_offload=true": "fsdp_cpu_offload=true; it needs FSDP2: launch with tune run --nproc_per",
    "owlore.rank=4096": "rank=4096; no weight's shorter side is above it",
    "owlore.num_active_layers=40": "num_active_layers=40; the model has 4 layers",
    "model.max_seq_len=1000000000000": "model.max_seq_len=1000000000000; it must be 1 to 16,777,216",
    "device=cuda:0": "torch finds no cuda device on this machine",
    "dtype=fp16": "dtype=fp16; choose bf16 or fp32",
    "device_memory_limit=0.001": "device_memory_limit=0.001 GB, and the plan is",
    # Model and data
    "model=torch.nn.Identity": "a decoder of torchtune or transformers; got Identity",
    "model.num_kv_heads=4": "the model's builder has num_key_value_heads=4, and config.json has 2",
    "checkpointer.checkpoint_dir=/nope": "checkpointer.checkpoint_dir=/nope is not a directory",
    "checkpointer.model_type=QWEN2": "the model's is llama; choose LLAMA2",
    "checkpointer.checkpoint_files=[no.safetensors]": "checkpointer: weights missing in model: model/no.safetensors",
    "tokenizer.max_seq_len=abc": "tokenizer.max_seq_len=abc; it must be a whole number from 1, or null",
    "tokenizer.max_seq_len=3": "dataset: no row has a token to train",
    "tokenizer.max_seq_len=null dataset.packed=true": "dataset.packed=true needs tokenizer.max_seq_len",
    "tokenizer.max_seq_len=null model.max_seq_len=8": "row 0 has 28 tokens, and the model takes 8",
    "dataset.data_files=/nope.json": "dataset.data_files=/nope.json does not exist",
    "dataset.data_files=null dataset.source=json": "dataset.source=json cannot be loaded",
    "batch_size=8 gradient_accumulation_steps=6": "40 samples, less than one optimizer step of batch_size=8",
    # Directories
    "output_dir=train.json": "output_dir=train.json is not writable",
    "metric_logger.log_dir=/proc/logs": "metric_logger.log_dir=/proc/logs is not writable",
    "metric_logger.filename=a/b.txt": "metric_logger.filename=a/b.txt; it must be the name of a file",
    "profiler.enabled=true profiler.output_dir=/proc/x": "profiler.output_dir=/proc/x is not writable",
    "resume_from_checkpoint=model": "/model/checkpoint.json cannot be read",
}  # fmt: skip


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_a_wrong_override(overrides, place, capsys, monkeypatch):
    arguments = ["--config", "train.yaml", *overrides.split()]
    assert OVERRIDES[overrides] in refused(owlore_full_finetune.recipe_main, arguments, capsys, monkeypatch)
    assert not list(place.glob("run/step_*")) and not (place / "run" / "run.json").exists()


EVALUATIONS = {
    "tasks=null": "nothing to evaluate; set tasks or data_files",
    "data_files=[a]": "data_files=['a']; it must map names to files",
    "tasks=[] data_files.a/b=choices.json": "tasks: 'a/b' cannot be the name of a task: files are named after it",
    "tasks=[] data_files.a=train.json": "row 0 has no 'Answer format",
    "max_length=1": "max_length=1; it must be at least 16, or no question would be read",
    "num_fewshot=1000": "num_fewshot=1000; mmlu_dev has 280 examples",
    "tokenizer.chat_template=plain apply_chat_template=true": "this model has no chat template, or",
    "data_root=/nope tasks=[mmlu]": "data_root=/nope is not a directory",
    "model.norm_eps=0.01": "the model's builder has rms_norm_eps=0.01, and config.json has 1e-05",
    "judge.base_url=https://me:secret@judge.example/v1": "judge.base_url contains a user name, key or query",
    "judge.base_url=https://judge.example/v1?secret": "judge.base_url contains a user name, key or query",
    "judge.base_url=http://[": "judge.base_url is not a URL",
}  # fmt: skip


@pytest.mark.parametrize("overrides", EVALUATIONS)
def test_a_wrong_evaluation(overrides, place, capsys, monkeypatch):
    choices = [{"instruction": "Which? Answer format: a/b", "answer": "a"}]
    (place / "choices.json").write_text(json.dumps(choices))
    arguments = ["--config", "eval.yaml", *overrides.split()]
    line = refused(owlore_eval.recipe_main, arguments, capsys, monkeypatch)
    assert EVALUATIONS[overrides] in line
    assert "secret" not in line + "".join(capsys.readouterr())


def test_an_expected_message_says_more_than_the_input():
    for overrides, message in (*OVERRIDES.items(), *EVALUATIONS.items()):
        assert len(message) > 12 and message not in overrides, overrides


@pytest.mark.parametrize(
    ("wanted", "right", "wrong", "name"),
    [
        (int, [0, 10**30], [1.5, "1", True, None], "int"),
        (int | None, [3, None], [True, "None"], "int | null"),
        (float, [1, 0.5], ["0.5", False, None], "a number"),
        (bool, [True, False], [1, "true", None], "bool"),
        (str, ["", "a"], [5, None, ["a"]], "str"),
    ],
)
def test_types_of_fields(wanted, right, wrong, name):
    for value in right:
        check_type("field", value, wanted)
    for value in wrong:
        with pytest.raises(ConfigError) as error:
            check_type("field", value, wanted)
        assert str(error.value) == f"field={value!r}; it must be {name}"


@pytest.mark.parametrize(
    ("within", "right", "wrong", "name"),
    [
        (COUNT, [1, 10**9], [0, -1, 10**9 + 1], "1 to 1,000,000,000"),
        (POSITIVE, [1e-9, 1e99], [0, -1.0], "above 0"),
        (Range(0, 5, without_least=True), [0.1, 5], [0, 5.1], "above 0, and at most 5"),
    ],
)
def test_ranges_of_fields(within, right, wrong, name):
    assert all(value in within for value in right) and not any(value in within for value in wrong)
    assert str(within) == name


class Reached(BaseException):
    """Raised when all checks passed and weights would be loaded."""


TRAIN = ["--config", "train.yaml"]
ACCEPTED: dict[str, tuple[Callable[[], object], list[str]]] = {
    "--config=NAME": (lambda: None, ["--config=train.yaml"]),
    "overrides before --config": (lambda: None, ["batch_size=2", *TRAIN]),
    "a BOM in config and data": (
        lambda: [rewrite(name, lambda text: "\ufeff" + text) for name in ("train.yaml", "train.json")], TRAIN
    ),
    "a directory named step_²": (lambda: Path("run/step_²").mkdir(parents=True), TRAIN),
    "files of the user's in output_dir": (lambda: nonempty("run"), TRAIN),
    "a whole number and nulls": (lambda: None, [*TRAIN, "optimizer.lr=1", "lr_scheduler=null", "clip_grad_norm=None"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_right_is_accepted(case, place, monkeypatch):
    prepare, arguments = ACCEPTED[case]
    prepare()

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(HFCheckpointer, "load_checkpoint", reached)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(Reached):
        owlore_full_finetune.recipe_main()


def test_home_is_meant_by_its_sign(place, monkeypatch):
    """Regression: with ``output_dir=~/x``, the metric logger made a directory named ``~``."""
    monkeypatch.setenv("HOME", str(place / "home"))
    rewrite("train.yaml", lambda text: text.replace("output_dir: run", "output_dir: ~/x"))
    recipe = recipe_of(OmegaConf.load("train.yaml"))
    assert recipe.settings.cfg.metric_logger.log_dir == str(place / "home" / "x" / "logs")
    assert recipe.settings.output_dir == place / "home" / "x"


def test_validate_imports_what_the_recipe_would_and_no_more(place, monkeypatch, capsys):
    """Components of a config can run code on import. Unknown keys are rejected before anything is imported."""
    Path("evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(place))
    rewrite("train.yaml", lambda text: text + "\nextra: {_component_: evil.run}\n")
    assert "unknown key extra" in refused(cli.main, ["validate", "--config", "train.yaml"], capsys, monkeypatch)
    Path("other.yaml").write_text(
        "model: {_component_: owlore_tune.models.smollm2.smollm2_135m}\nmine: {_component_: evil.run}\n"
    )
    monkeypatch.setattr(sys, "argv", ["owlore", "validate", "--config", "other.yaml"])
    cli.main()
    assert "other.yaml is valid" in capsys.readouterr().out
