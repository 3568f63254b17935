"""Wrong overrides: a one-line error names the value before weights are loaded. Right ones are accepted."""

# ruff: noqa: E501  (a row of a table is a line)

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
from runs import recipe_of

OVERRIDES = {
    # Syntax of overrides
    "batch_size": "override 'batch_size' is not of the form field=value",
    "batch_size=1=2": "override 'batch_size=1=2' is not of the form",
    "~missing": "Could not find key missing",
    "~owlore.missing": "Could not find key owlore.missing",
    "~batch_size.x": "overrides ~batch_size.x",
    "~": "overrides ~: Could not find key in yaml config to remove",
    "~model": "overrides ~model: ",
    "=5": "unknown key ; known keys are batch_size, batch_size_val, checkpointer, clip_grad_norm, collate_fn",
    "batch_size.x=1": "batch_size={'x': 1}; it must be int",
    "batch_size=[1": "overrides batch_size=[1",
    "batch_size=${nope}": "Interpolation key 'nope' not found full_key: batch_size object_type=dict",
    "batch_size=${": "overrides batch_size=${: no viable alternative at input '${' full_key: batch_size object_type=dict",
    "output_dir=${oc.env:NOT_SET_ANYWHERE}": "KeyError raised while resolving interpolation: \"Environment variable 'NOT_SET_ANYWHERE' not found\"",
    "batch_size=???": "override 'batch_size=???' is not of the form",
    "--batch_size": "unrecognized arguments: --batch_size",
    # Keys
    "learning_rate=1": "unknown key learning_rate",
    "owlore.num_actve_layers=2": "did you mean num_active_layers?",
    "owlore.rnk=2": "unknown key owlore.rnk; did you mean rank?",
    "dataset.packd=true": "unknown key dataset.packd",
    "loss=null": "loss=null; the run needs one",
    "optimizer=null": "missing in the config: optimizer",
    "owlore=5": "owlore=5; it must be a block of fields",
    "~owlore": "missing in the config: owlore",
    # Components
    "optimizer=math.pi": "optimizer._component_=math.pi is a float",
    "optimizer=os.path": "optimizer._component_=os.path is a module",
    "optimizer=5": "optimizer._component_=5; it must be str",
    "optimizer=nope.nope": "optimizer._component_=nope.nope",
    "optimizer=.nope": "optimizer._component_=.nope",
    "optimizer=torch.optim.SGD": "unknown key optimizer.betas",
    "model=torchtune.models.llama2.lama2": "model._component_=torchtune.models.llama2.lama2: Error loading 'torchtune.models.llama2.lama2':",
    "model=json.dumps": "model: missing a required argument: 'obj' of json.dumps",
    "model=builtins.print": "unknown key model.vocab_size; known keys are _component_, args, end, file, flush, sep; or remove it",
    "tokenizer=torch.nn.Identity": "tokenizer._component_=torch.nn.Identity is not a valid tokenizer: it has no pad_id",
    "tokenizer=torchtune.models.llama2.llama2_tokenizer": "unknown key tokenizer.chat_template; did you mean prompt_template?",
    "dataset=torch.nn.Identity": "dataset._component_=torch.nn.Identity is not a valid dataset: it has no __len__",
    "dataset=builtins.list": "unknown key dataset.data_files; known keys are _component_, iterable; or remove it with",
    "loss=torch.nn.MSELoss": "loss._component_=torch.nn.MSELoss is not a valid loss: it has no ignore_index",
    "loss=torch.nn.CTCLoss": "loss._component_=torch.nn.CTCLoss is not a valid loss: it has no ignore_index",
    "loss=torch.nn.Identity": "loss._component_=torch.nn.Identity is not a valid loss: it has no ignore_index",
    "lr_scheduler=torch.nn.Identity": "lr_scheduler._component_=torch.nn.Identity is not a valid lr_scheduler: it has no step",
    "~lr_scheduler.num_warmup_steps": "lr_scheduler: missing a required argument: 'num_warmup_steps' of",
    "lr_scheduler.num_warmup_steps=abc": "num_warmup_steps='abc'",
    "metric_logger=torch.nn.Identity": "metric_logger._component_=torch.nn.Identity is not a valid metric_logger: it has no log_dict",
    "metric_logger=torchtune.training.metric_logging.Disklogger": "metric_logger._component_=torchtune.training.metric_logging.Disklogger: Error loading",
    "metric_logger=torchtune.training.metric_logging.CometLogger": "pip install comet_ml",
    "checkpointer=torch.nn.Identity": "checkpointer._component_=torch.nn.Identity; this recipe needs owlore_tune.checkpoints.HFCheckpointer",
    "collate_fn=null": "collate_fn=None; it must be str",
    "collate_fn=5": "collate_fn=5; it must be str",
    "collate_fn=nope.nope": "collate_fn=nope.nope: Error loading 'nope.nope': ModuleNotFoundError(\"No module named 'nope'\") Are",
    "collate_fn=math.pi": "collate_fn=math.pi is a float",
    "collate_fn=torchtune.data.left_pad_sequence": "pads on the left",
    "collate_fn=json.dumps": "collate_fn=json.dumps cannot make a batch of dataset's samples: TypeError(\"JSONEncoder.__init__()",
    "loss.chunk_size=0": "loss.chunk_size=0; it must be at least 1 position",
    "loss.chunk_size=abc": "loss.chunk_size=abc; it must be at least 1 position",
    "loss.chunk_size=1.5": "loss.chunk_size=1.5; it must be at least 1 position",
    "lr_scheduler.num_warmup_steps=.nan": "lr_scheduler.num_warmup_steps=nan",
    "profiler.enabled=maybe": "profiler.enabled='maybe'; it must be bool",
    "model.num_heads=0": "model: integer division or modulo by zero (with vocab_size=300, num_layers=4, num_heads=0",
    "device=meta": "device=meta, dtype=fp32: it has no memory",
    # Optimizer
    "optimizer.lr=true": 'optimizer.lr=True; it must be a finite number',
    "optimizer.lr=abc": "optimizer.lr='abc'; it must be a finite number",
    "optimizer.lr=-1": 'optimizer: Invalid learning rate: -1',
    "optimizer.lr=.nan": 'optimizer.lr=nan; it must be a number',
    "optimizer.lr=.inf": 'optimizer.lr=inf; it must be a finite number',
    "optimizer.lr=null": 'optimizer.lr=None; it must be a finite number',
    "owlore.rank=true": 'owlore.rank=True; it must be int',
    "owlore.rank=0": 'owlore.rank=0; it must be 1 to 1,000,000,000, or null',
    "owlore.rank=1.5": 'owlore.rank=1.5; it must be int',
    "owlore.rank=abc": "owlore.rank='abc'; it must be int",
    "owlore.rank=4096": "rank=4096; no weight's shorter side is above it",
    "owlore.scale=.nan": "owlore.scale=nan",
    "owlore.scale=abc": "owlore.scale='abc'; it must be a number",
    "optimizer.eps=abc": "optimizer: '<=' not supported",
    "optimizer.weight_decay=-0.1": 'optimizer: Invalid weight_decay value: -0.1',
    "optimizer.betas=5": "optimizer: 'int' object is not subscriptable (with fused=True, lr=0.001, betas=5, weight_decay=0.0",
    "optimizer.betas=[0.9]": "optimizer: list index out of range (with fused=True, lr=0.001, betas=[0.9]",
    "optimizer.betas=[0.9,1.5]": 'optimizer: Invalid beta parameter at index 1: 1.5',
    "owlore.update_gap=0": 'owlore.update_gap=0; it must be 1 to 1,000,000,000',
    "owlore.update_gap=true": 'owlore.update_gap=True; it must be int',
    "owlore.moments=x": 'owlore.moments=x; choose one of keep, project, reset',
    "owlore.side=left": 'owlore.side=left; choose one of right, shape',
    # The owlore block
    "owlore.num_active_layers=0": "owlore.num_active_layers=0; it must be 1 to 1,000,000,000, or null",
    "owlore.num_active_layers=-1": "owlore.num_active_layers=-1; it must be 1 to 1,000,000,000, or null",
    "owlore.num_active_layers=40": "num_active_layers=40; the model has 4 layers",
    "owlore.num_active_layers=two": "owlore.num_active_layers='two'",
    "owlore.num_active_layers=true": "owlore.num_active_layers=True",
    "owlore.resample_every=0": "owlore.resample_every=0; it must be 1 to 1,000,000,000",
    "owlore.resample_every=-5": "owlore.resample_every=-5; it must be 1 to 1,000,000,000",
    "owlore.resample_every=true": "owlore.resample_every=True",
    "owlore.weights=int4": "owlore.weights=int4; choose one of full, int8, nf4",
    "owlore.score=outliers": "owlore.score=outliers; choose one of outlier",
    "owlore.draw=random": "owlore.draw=random; choose one of systematic",
    "owlore.outlier_threshold=0": "owlore.outlier_threshold=0; it must be above 0, and at most 1,000,000,000",
    "owlore.outlier_threshold=.nan": "owlore.outlier_threshold=nan",
    "owlore.calibration_batches=0": "owlore.calibration_batches=0; it must be 1 to 1,000,000,000",
    "owlore.scores_file=/nope.json": "scores_file=/nope.json cannot be read",
    "owlore.scores_file=model": "scores_file=model cannot be read",
    "owlore.scores_file=5": "owlore.scores_file=5; it must be str | null",
    "owlore.scores_file=train.json": "scores_file=train.json cannot be read (owlore_tune.layers.scores.LayerScores() argument after",
    "owlore.inactive_state=x": "owlore.inactive_state=x; choose one of drop, offload, keep",
    "owlore.train_embeddings=5": "owlore.train_embeddings=5; it must be bool",
    # The run
    "batch_size=0": "batch_size=0; it must be 1 to 1,000,000,000",
    "batch_size=two": "batch_size='two'; it must be int",
    "batch_size=true": "batch_size=True; it must be int",
    "batch_size=64": "dataset has 40 samples, less than one optimizer step",
    "batch_size_val=2.5": "batch_size_val=2.5; it must be int | null",
    "gradient_accumulation_steps=-1": "gradient_accumulation_steps=-1; it must be 1 to 1,000,000,000",
    "epochs=0": "epochs=0; it must be 1 to 1,000,000,000",
    "epochs=10**18": "epochs='10**18'; it must be int",
    "epochs=1000000000000000000": "epochs=1000000000000000000; it must be 1 to",
    "max_steps_per_epoch=0": "max_steps_per_epoch=0; it must be 1 to 1,000,000,000, or null",
    "seed=abc": "seed='abc'; it must be int",
    "seed=null": "seed=None; it must be int",
    "seed=-1": "seed=-1; it must be 0 to 2,147,483,648",
    "seed=1000000000000000000000": "seed=1000000000000000000000; it must be 0 to 2,147,483,648",
    "shuffle=maybe": "shuffle='maybe'; it must be bool",
    "compile='yes please'": "compile='yes please'; it must be bool",
    "enable_activation_checkpointing=1": "enable_activation_checkpointing=1; it must be bool",
    "clip_grad_norm=0": "clip_grad_norm=0; it must be above 0, or null",
    "clip_grad_norm=-1": "clip_grad_norm=-1; it must be above 0, or null",
    "clip_grad_norm=big": "clip_grad_norm='big'; it must be a number | null",
    "clip_grad_norm=true": "clip_grad_norm=True",
    "clip_grad_norm=.nan": "clip_grad_norm=nan",
    "device=tpu": "device=tpu, dtype=fp32: Expected one of cpu, cuda, ipu, xpu, mkldnn, opengl, opencl, ideep, hip",
    "device=5": "device=5; it must be str",
    "device=cuda:99": "torch finds no cuda device on this machine",
    "device=cuda:0": "torch finds no cuda device on this machine",
    "device=hpu": "torch finds no hpu device on this machine",
    "device=privateuseone": "torch finds no privateuseone device on this machine",
    "model.max_seq_len=0": "model.max_seq_len=0; it must be 1 to 16,777,216",
    "model.max_seq_len=-1": "model: upper bound and lower bound inconsistent with step sign",
    "model.max_seq_len=1.5": "model.max_seq_len=1.5; it must be 1 to 16,777,216",
    "dtype=fp16": "dtype=fp16; choose bf16 or fp32",
    "dtype=fp64x": "dtype=fp64x: Dtype fp64x must be one of fp16, bf16, fp32, fp64",
    "dtype=5": "dtype=5; it must be str",
    "device_memory_limit=0": "device_memory_limit=0; it must be above 0, or null",
    "device_memory_limit=-1": "device_memory_limit=-1; it must be above 0, or null",
    "device_memory_limit=abc": "device_memory_limit='abc'; it must be a number | null",
    "device_memory_limit=0.001": "device_memory_limit=0.001 GB, and the plan is",
    "output_dir=5": "output_dir=5; it must be str",
    "output_dir=/proc/run": "output_dir=/proc/run is not writable",
    "output_dir=train.json": "output_dir=train.json is not writable",
    "resume_from_checkpoint=/nope": "resume_from_checkpoint=/nope: /nope/checkpoint.json cannot be read",
    "resume_from_checkpoint=model": "/model/checkpoint.json cannot be read",
    "resume_from_checkpoint=5": "resume_from_checkpoint=5; it must be",
    "keep_last_n=0": "keep_last_n=0; it must be 1 to 1,000,000,000, or null",
    "save_every_n_steps=0": "save_every_n_steps=0; it must be 1 to 1,000,000,000, or null",
    "max_skipped_steps=0": "max_skipped_steps=0; it must be 1 to 1,000,000,000",
    "log_every_n_steps=0": "log_every_n_steps=0; it must be 1 to 1,000,000,000",
    "profiler=5": "profiler._component_=5; it must be str",
    # The model directory
    "checkpointer.checkpoint_dir=/nope": "checkpointer.checkpoint_dir=/nope is not a directory",
    "checkpointer.checkpoint_dir=5": "checkpointer.checkpoint_dir=5 is not a directory",
    "checkpointer.model_type=LAMA": "checkpointer.model_type=LAMA; choose one of the causal decoders",
    "checkpointer.model_type=QWEN2": "the model's is llama; choose LLAMA2",
    "checkpointer.model_type=CLIP_TEXT": "checkpointer.model_type=CLIP_TEXT; choose one of the causal decoders",
    "checkpointer.model_type=T5_ENCODER": "checkpointer.model_type=T5_ENCODER; choose",
    "checkpointer.model_type=5": "checkpointer.model_type=5; choose one of the causal decoders LLAMA2, LLAMA3, LLAMA3_2, MISTRAL",
    "checkpointer.checkpoint_files=[no.safetensors]": "checkpointer: weights missing in model: model/no.safetensors",
    "checkpointer.checkpoint_files=5": "checkpointer: 'int' object is not iterable (with checkpoint_dir='model', model_type='LLAMA2'",
    "tokenizer.path=/nope": "tokenizer.path=/nope has no tokenizer.json",
    "tokenizer.path=5": "tokenizer.path=5 has no tokenizer.json",
    "tokenizer.max_seq_len=0": "tokenizer.max_seq_len=0; it must be at least 1, or null for no limit",
    "tokenizer.max_seq_len=true": "tokenizer.max_seq_len=True",
    "tokenizer.max_seq_len=abc": "tokenizer.max_seq_len=abc; it must be a whole number, or null for no limit",
    "tokenizer.chat_template=llama": "tokenizer.chat_template=llama; choose one of model, plain",
    "dataset.packed=maybe": "dataset.packed='maybe'; it must be bool",
    "dataset.data_files=5": "dataset.data_files=5; it must be a file",
    "dataset.data_files=/nope.json": "dataset.data_files=/nope.json does not exist",
    "dataset.data_files=model": "dataset.data_files=model is not a file",
    "dataset.data_files=/proc/self/mem": "dataset.data_files=/proc/self/mem cannot be read",
    "dataset.data_files=null": "dataset.data_files is not set; it names the files to train on",
}  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override(override, place, capsys, monkeypatch):
    line = refused(owlore_full_finetune.recipe_main, ["--config", "train.yaml", override], capsys, monkeypatch)
    assert OVERRIDES[override] in line
    assert not list(place.glob("run/step_*")) and not (place / "run" / "run.json").exists()


EVALUATIONS = {
    "tasks=[nope]": "no task, group or tag named nope",
    "tasks=null": "nothing to evaluate; set tasks or data_files",
    "tasks=[5]": "tasks=5; it must be str",
    "data_files.a=5": "data_files.a=5; it must be str",
    "data_root=5": "data_root=5; it must be str",
    "data_dir=5": "data_dir=5; it must be str",
    "tasks=[]": "nothing to evaluate",
    "data_files.a=/nope.json": "data_files=/nope.json does not exist",
    "data_files.a=model": "data_files=model is not a file",
    "data_files=[a]": "data_files=['a']; it must map names to files",
    "data_files.a=train.json": "row 0 has no 'Answer format",
    "scoring=x": "scoring=x; choose one of",
    "num_fewshot=-1": "num_fewshot=-1; it must be 0 to 1,000,000,000, or null",
    "num_fewshot=abc": "num_fewshot='abc'",
    "limit=0": "limit=0; it must be 1 to 1,000,000,000, or null",
    "batch_size=0": "batch_size=0; it must be 1 to 1,000,000,000, or null",
    "apply_chat_template=5": "apply_chat_template=5; it must be bool | null",
    "fewshot_as_multiturn=x": "fewshot_as_multiturn='x'",
    "use_cache=5": "use_cache=5; it must be bool",
    "seed=abc": "seed='abc'; it must be int",
    "min_coverage=2.0": "min_coverage=2.0; it must be 0 to 1",
    "add_bos=5": "add_bos=5; it must be bool | null",
    "tasks=[mt_bench]": "data_dir is not set",
    "tasks=[mmlu]": "the data of mmlu is neither",
    "data_root=/nope": "data_root=/nope is not a directory",
    "model=torch.nn.Identity": "OwLore samples the layers of a decoder of torchtune or transformers; got Identity. Set",
    "checkpointer.model_type=QWEN2": "the model's is llama",
    "tokenizer=torchtune.models.llama2.llama2_tokenizer": "tokenizer: FAILED_PRECONDITION",
    "judge=5": "judge=5; it must be a block of fields",
    "judge.base_url=https://me:secret@judge.example/v1": "judge.base_url contains a user name, key or query, which would be logged",
    "judge.base_url=https://judge.example/v1?key": "judge.base_url contains a user name, key or query",
    "judge.base_url=ftp://judge.example": "it must begin with http",
    "judge.base_url=localhost": "judge.base_url=localhost; it must begin with http",
    "judge.base_url=http://[": "judge.base_url is not a URL",
    "dtype=fp64x": "dtype=fp64x: Dtype fp64x must be one of fp16, bf16, fp32, fp64",
    "output_dir=train.json": "output_dir=train.json is not writable",
}


@pytest.mark.parametrize("override", EVALUATIONS)
def test_a_wrong_evaluation(override, place, capsys, monkeypatch):
    arguments = ["--config", "eval.yaml", override]
    if override == "data_root=/nope":
        arguments.append("tasks=[mmlu]")
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    line = refused(owlore_eval.recipe_main, arguments, capsys, monkeypatch)
    assert EVALUATIONS[override] in line
    assert "secret" not in line + "".join(capsys.readouterr())


def test_an_expected_message_says_more_than_the_input():
    for override, message in (*OVERRIDES.items(), *EVALUATIONS.items()):
        assert len(message) > 12 and message not in override, override


class Reached(BaseException):
    """Raised when all checks passed and weights would be loaded."""


ACCEPTED: dict[str, tuple[Callable[[], object], list[str]]] = {
    "as it is": (lambda: None, ["--config", "train.yaml"]),
    "--config=NAME": (lambda: None, ["--config=train.yaml"]),
    "overrides before --config": (lambda: None, ["batch_size=2", "--config", "train.yaml"]),
    "a BOM in the config": (lambda: rewrite("train.yaml", lambda t: "\ufeff" + t), ["--config", "train.yaml"]),
    "a BOM in the data": (lambda: rewrite("train.json", lambda t: "\ufeff" + t), ["--config", "train.yaml"]),
    "a directory named step_²": (lambda: Path("run/step_²").mkdir(parents=True), ["--config", "train.yaml"]),
    "files of the user's in output_dir": (lambda: nonempty("run"), ["--config", "train.yaml"]),
    "a float for a whole lr": (lambda: None, ["--config", "train.yaml", "optimizer.lr=1"]),
    "nulls": (lambda: None, ["--config", "train.yaml", "lr_scheduler=null", "profiler=null", "clip_grad_norm=null"]),
    "a text for null": (lambda: None, ["--config", "train.yaml", "clip_grad_norm=None"]),
}


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
