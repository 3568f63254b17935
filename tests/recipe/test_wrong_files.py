"""Wrong files and commands: a one-line error names the value before weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from places import nonempty, refused, rewrite, with_json, with_yaml

import owlore_full_finetune
from owlore_tune import cli


def unlink_weights() -> None:
    Path("model/model.safetensors").unlink()


def scores(values: list) -> None:
    """Write a scores file, and name it in the config."""
    Path("s.json").write_text(
        json.dumps({"scores": values, "score": "outlier", "fingerprint": "x", "options": {"threshold": 13.0}})
    )
    config = OmegaConf.to_container(OmegaConf.load("train.yaml"), resolve=False)
    config["owlore"]["scores_file"] = "s.json"
    OmegaConf.save(OmegaConf.create(config), "train.yaml")


def logger(**fields) -> None:
    component = "torchtune.training.metric_logging.DiskLogger"
    with_yaml("train.yaml", metric_logger={"_component_": component, "log_dir": "logs"} | fields)


TOKENIZER = {"_component_": "owlore_tune.data.HFChatTokenizer", "path": "model"}
INSTRUCTIONS = "owlore_tune.data.instruction_dataset"
FILES: dict[str, tuple[Callable[[], object], str]] = {
    "config is missing": (lambda: Path("train.yaml").unlink(), "no file and no packaged config named train.yaml"),
    "config is empty": (lambda: Path("train.yaml").write_text(""), "train.yaml is empty"),
    "config is a list": (lambda: Path("train.yaml").write_text("- 1\n- 2\n"), "not a mapping of fields"),
    "config is a number": (lambda: Path("train.yaml").write_text("5\n"), "train.yaml"),
    "config is not YAML": (lambda: Path("train.yaml").write_text("a: [1\nb: }"), "cannot be read as YAML"),
    "config has tabs": (lambda: Path("train.yaml").write_text("a:\n\t- 1\n"), "cannot be read as YAML"),
    "config is binary": (lambda: Path("train.yaml").write_bytes(bytes(range(256))), "cannot be read as YAML"),
    "config has a key twice": (
        lambda: rewrite("train.yaml", lambda text: text + "\nseed: 1\nseed: 2\n"), "cannot be read as YAML"
    ),
    "config has a number for a key": (lambda: rewrite("train.yaml", lambda text: text + "\n5: 1\n"), "the key 5"),
    "config has a broken interpolation": (
        lambda: rewrite("train.yaml", lambda text: text.replace("compile: false", "compile: ${nope.nope}")), "nope.nope"
    ),
    "weights are truncated": (
        lambda: Path("model/model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes()[:999]),
        "model/model.safetensors cannot be read",
    ),
    "weights are missing": (lambda: Path("model/model.safetensors").unlink(), "weights missing in model"),
    "weights are text": (lambda: Path("model/model.safetensors").write_text("x"), "model.safetensors cannot be read"),
    "index has no weight_map": (
        lambda: Path("model/model.safetensors.index.json").write_text("{}"), "index.json has no readable weight_map"
    ),
    "index is a list": (
        lambda: Path("model/model.safetensors.index.json").write_text("[]"), "index.json has no readable weight_map"
    ),
    "index is broken": (lambda: Path("model/model.safetensors.index.json").write_text("{"), "index.json has no"),
    "index names a file elsewhere": (
        lambda: Path("model/model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "names ../x.safetensors",
    ),
    "config.json is missing": (lambda: Path("model/config.json").unlink(), "no readable config.json"),
    "config.json is broken": (lambda: Path("model/config.json").write_text("{"), "no readable config.json"),
    "config.json is a list": (lambda: Path("model/config.json").write_text("[]"), "no readable config.json"),
    "config.json lacks heads": (lambda: with_json("model/config.json", num_attention_heads=None), "config.json lacks"),
    "config.json is of another kind": (lambda: with_json("model/config.json", model_type="t5"), "the model's is t5"),
    "config.json has no heads": (lambda: with_json("model/config.json", num_attention_heads=0), "0 for num_heads"),
    "config.json has text for heads": (
        lambda: with_json("model/config.json", num_attention_heads="4"), "'4' for num_heads is not a whole number"
    ),
    "config.json has heads that do not divide": (
        lambda: with_json("model/config.json", num_key_value_heads=3), "the numbers of heads are not divisible"
    ),
    "chat template divides by zero": (
        lambda: with_json("model/tokenizer_config.json", chat_template="{{ 1/0 }}"), "row 0: the chat template rejects"
    ),
    "chat template has an unknown tag": (
        lambda: with_json("model/tokenizer_config.json", chat_template="{% nope %}"), "cannot be read: Encountered"
    ),
    "generation_config.json names no token": (
        lambda: with_json("model/generation_config.json", eos_token_id="x"), "eos_token_id 'x' is not a token id"
    ),
    "config.json has no kind": (lambda: with_json("model/config.json", model_type=None), "the model's is None"),
    "tokenizer.json is broken": (
        lambda: Path("model/tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"
    ),
    "the model directory is that of a run": (
        lambda: (Path("model/tokenizer.json").unlink(), *(Path("model", f"step_{n}").mkdir() for n in (3, 20))),
        "has no tokenizer.json; name a checkpoint in it, such as model/step_20",
    ),
    "tokenizer.json is missing": (lambda: Path("model/tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer_config.json is broken": (
        lambda: Path("model/tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"
    ),
    "tokenizer_config.json is a list": (
        lambda: Path("model/tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json cannot be read: it is not a JSON object",
    ),
    "a special token is unknown": (
        lambda: with_json("model/tokenizer_config.json", eos_token="<none>"), "is not in the vocabulary"
    ),
    "no chat template": (
        lambda: with_json("model/tokenizer_config.json", chat_template=None), "set tokenizer.chat_template=plain"
    ),
    "chat template is broken": (
        lambda: with_json("model/tokenizer_config.json", chat_template="{% for"), "the chat template cannot be read"
    ),
    "chat template refuses": (
        lambda: with_json("model/tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "row 0: the chat template rejects these messages: no",
    ),
    "data is empty": (lambda: Path("train.json").write_text(""), "dataset.data_files=train.json is empty"),
    "data is an empty list": (lambda: Path("train.json").write_text("[]"), "dataset.data_files=train.json is empty"),
    "data is not JSON": (lambda: Path("train.json").write_text("[1,"), "dataset.data_files=train.json is not JSON"),
    "data is not text": (lambda: Path("train.json").write_bytes(b"\xff\xfe\x00"), "train.json is not JSON"),
    "a line is broken": (
        lambda: Path("train.json").write_text('{"instruction": "a", "output": "b"}\n\n\n{"instruction"\n'),
        "train.json is not JSON: line 4:",
    ),
    "a row is no object": (lambda: Path("train.json").write_text("[5]"), "row 0 has no text in field 'instruction'"),
    "a row lacks a field": (
        lambda: Path("train.json").write_text('[{"instruction": "a"}]'), "row 0 has no text in field 'output'"
    ),
    "half a surrogate pair": (
        lambda: Path("train.json").write_text('[{"instruction": "a", "output": "\\ud800"}]'),
        "row 0 has an unpaired surrogate in field 'output'",
    ),
    "all rows are blank": (
        lambda: Path("train.json").write_text('[{"instruction": "a", "output": " "}]'), "train.json is empty"
    ),
    "dataset is a number": (lambda: with_yaml("train.yaml", dataset=5), "dataset=5; it must be a block of fields"),
    "dataset is a list of null": (lambda: with_yaml("train.yaml", dataset=[None]), "dataset=None; it must be a block"),
    "dataset is a list of numbers": (lambda: with_yaml("train.yaml", dataset=[5]), "dataset=5; it must be a block of"),
    "dataset is an empty list": (lambda: with_yaml("train.yaml", dataset=[]), "dataset=[]; it must be a block"),
    "dataset_val is a text": (lambda: with_yaml("train.yaml", dataset_val="x"), "dataset_val=x; it must be a block of"),
    "profiler is a number": (lambda: with_yaml("train.yaml", profiler=5), "profiler=5; it must be a block of fields"),
    "profiler is a list": (lambda: with_yaml("train.yaml", profiler=[None]), "profiler=[None]; it must be a block of"),
    "model is a list": (lambda: with_yaml("train.yaml", model=[]), "model=[]; it must be a block of fields with _comp"),
    "optimizer is a list": (lambda: with_yaml("train.yaml", optimizer=[5]), "optimizer=[5]; it must be a block of"),
    "loss is a text": (lambda: with_yaml("train.yaml", loss="x"), "loss=x; it must be a block of fields"),
    "model is no decoder": (
        lambda: with_yaml("train.yaml", model={"_component_": "torch.nn.Linear", "in_features": 2, "out_features": 2}),
        "a decoder of torchtune or transformers; got Linear",
    ),
    "optimizer is none": (
        lambda: with_yaml("train.yaml", optimizer={"_component_": "torch.nn.ParameterList"}),
        "needs torch.optim.Optimizer",
    ),
    "loss has no component": (lambda: with_yaml("train.yaml", model={"a": 1}), "model={'a': 1}; it must be a block of"),
    "lr_scheduler is true": (lambda: with_yaml("train.yaml", lr_scheduler=True), "lr_scheduler=True; it must be a"),
    "output_dir has a NUL behind a tilde": (
        lambda: with_yaml("train.yaml", output_dir="~a\0b/c"), "has a NUL character, which no path or name can have"
    ),
    "output_dir is empty": (lambda: with_yaml("train.yaml", output_dir=""), "output_dir is empty; name a directory"),
    "no row has a token to train": (
        lambda: with_yaml("train.yaml", tokenizer=TOKENIZER | {"max_seq_len": 3}), "dataset: no row has a token to tra"
    ),
    "the logger's file is elsewhere": (lambda: logger(filename="/proc/x"), "metric_logger.filename=/proc/x; it"),
    "the logger's file is below": (lambda: logger(filename="a/b.txt"), "metric_logger.filename=a/b.txt; it must be"),
    "the logger's file is a number": (lambda: logger(filename=5), "metric_logger.filename=5; it must be str"),
    "the logger's directory is a number": (lambda: logger(log_dir=5), "metric_logger.log_dir=5; it must be str"),
    "the logger has no directory": (lambda: logger(log_dir=None), "metric_logger.log_dir=None; it must be str"),
    "config.json has no positions": (
        lambda: with_json("model/config.json", max_position_embeddings=0), "the model cannot be compared with"
    ),
    "config.json has one position": (
        lambda: with_json("model/config.json", max_position_embeddings=1), "the model cannot be compared with"
    ),
    "output_dir has a NUL": (lambda: with_yaml("train.yaml", output_dir="a\0b"), "has a NUL character"),
    "a path has a NUL": (
        lambda: with_yaml("train.yaml", dataset={"_component_": INSTRUCTIONS, "data_files": "a\0b"}), "has a NUL charac"
    ),
    "output_dir is of no user": (
        lambda: with_yaml("train.yaml", output_dir="~nosuchuser/x"), "there is no user nosuchuser; a file name that be"
    ),
    "chat template is white": (
        lambda: with_json("model/tokenizer_config.json", chat_template="  "), "the chat template of model is empty"
    ),
    "chat template is empty": (
        lambda: with_json("model/tokenizer_config.json", chat_template=""), "the chat template of model is empty or no"
    ),
    "chat template is a number": (
        lambda: with_json("model/tokenizer_config.json", chat_template=5), "the chat template of model is empty or no"
    ),
    "chat_template.jinja is empty": (
        lambda: Path("model/chat_template.jinja").write_text(""), "the chat template of model is empty or no text"
    ),
    "named templates have no default": (
        lambda: with_json("model/tokenizer_config.json", chat_template=[{"name": "x"}, 5]), "tokenizer.chat_template=pl"
    ),
    "config.json is nested deeply": (
        lambda: Path("model/config.json").write_text(100_000 * "[" + 100_000 * "]"), "it is nested too deeply"
    ),
    "config.json is of quantized weights": (
        lambda: with_json("model/config.json", quantization_config={"quant_method": "gptq"}),
        "has a quantization_config (quant_method=gptq), and quantized weights cannot be trained",
    ),
    "config.json has another activation": (
        lambda: with_json("model/config.json", hidden_act="gelu"), "builder computes something else than config.json"
    ),
    "config.json has an activation that does not exist": (
        lambda: with_json("model/config.json", hidden_act="nope"), "the model cannot be compared with config.json: "
    ),
    "config.json has a scaled rope": (
        lambda: with_json("model/config.json", rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1e4}),
        "builder computes something else than config.json describes",
    ),
    "config.json has a rope that does not exist": (
        lambda: with_json("model/config.json", rope_parameters={"rope_type": "nope", "rope_theta": 1e4}), "nope"
    ),
    "config.json has another epsilon": (
        lambda: with_json("model/config.json", rms_norm_eps=0.1), "builder has rms_norm_eps=1e-05, and config.json has"
    ),
    "config.json has a list for layers": (
        lambda: with_json("model/config.json", num_hidden_layers=[4]), "config.json of a llama is not valid"
    ),
    "there is a second set of weights": (
        lambda: shutil.copy("model/model.safetensors", "model/copy.safetensors"),
        "choose with checkpointer.checkpoint_files, such as [model.safetensors]",
    ),
    "a PyTorch file has a nested dict": (
        lambda: (torch.save({"model": {"a": torch.ones(1)}}, "model/pytorch_model.bin"), unlink_weights()),
        "pytorch_model.bin has a dict at model, not a tensor; convert it first",
    ),
    "a PyTorch file has an object": (
        lambda: (torch.save({"a": Path("x")}, "model/pytorch_model.bin"), unlink_weights()),
        "model/pytorch_model.bin cannot be read: ",
    ),
    "a PyTorch file is empty": (
        lambda: (Path("model/pytorch_model.bin").write_bytes(b""), unlink_weights()), "pytorch_model.bin cannot be read"
    ),
    "scores are of other weights": (lambda: scores([1.0] * 4), "was made for other weights (x"),
    "scores are huge": (lambda: scores([1e308] * 4), "the score of layer 0 is 1e+308; recreate the file"),
    "scores are huge integers": (lambda: scores([10**400] * 4), "the score of layer 0 is 1000000000"),
    "scores are texts": (lambda: scores(["1"] * 4), "the score of layer 0 is 1; recreate the file"),
    "scores are true": (lambda: scores([True] * 4), "the score of layer 0 is True; recreate the file"),
    "scores are nested deeply": (
        lambda: (scores([]), Path("s.json").write_text(100_000 * "[" + 100_000 * "]")), "it is nested too deeply"
    ),
    "output_dir has a manifest": (
        lambda: (Path("run").mkdir(), Path("run/manifest.json").write_text("mine")),
        "run has manifest.json, which this run did not make",
    ),
    "output_dir has a checkpoint": (
        lambda: Path("run/step_7").mkdir(parents=True), "run has step_7, which this run did not make"
    ),
    "output_dir has a run.json of another program": (
        lambda: (Path("run").mkdir(), Path("run/run.json").write_text("{}")), "run.json"
    ),
    "output_dir has another lock file": (
        lambda: (Path("run").mkdir(), Path("run/.owlore.lock").write_text("my notes")), ".owlore.lock is not a lock"
    ),
    "output_dir has an evaluation": (
        lambda: (
            Path("run").mkdir(),
            Path("run/run.json").write_text(json.dumps({"kind": "evaluation", "run_id": 4 * "01234567", "parent": 0})),
        ),
        "holds the evaluation of 01234567",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file(case, place, capsys, monkeypatch):
    spoil, message = FILES[case]
    spoil()
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    line = refused(owlore_full_finetune.recipe_main, ["--config", "train.yaml"], capsys, monkeypatch)
    assert message in line
    assert all(file.read_bytes() == content for file, content in before.items())


GOOD_RUN: dict[str, object] = {
    "manifest.json": {
        "memory_bytes": {"planned": {"weights": 1, "total": 2}, "measured": {"weights": 1, "total": 2}}, "steps": 2,
        "probabilities": [0.5, 0.5], "held_out_loss": {"before": 1.0, "step 1": None, "after": 0.5}, "config": {},
        "draws": [],
    },
    "scores.json": {"scores": [1, 2], "score": "outlier"},
    "steps.jsonl": {"step": 1, "loss": 1.0, "step_seconds": 0.1, "forward_seconds": 0.05},
    "draws.jsonl": {"step": 0, "end": 2, "active": [0]},
}  # fmt: skip


def a_run(file: str = "", content: object = None) -> None:
    """The files of a finished run, one of them with other content."""
    Path("r").mkdir()
    for name, value in GOOD_RUN.items():
        if name == file:
            value = {**value, **content} if isinstance(content, dict) else content  # type: ignore[dict-item]
        Path("r", name).write_text(value if isinstance(value, str) else json.dumps(value) + "\n")


def an_evaluation(text: str | None = None, **content) -> None:
    Path("e").mkdir()
    Path("e/results_1.json").write_text(text or json.dumps({"results": {"t": {"acc,none": 0.5}}} | content))


NO_RUN = "r is not the output_dir of a training run: "
NO_RESULTS = "e/results_1.json is not a results file: "
DEEP = 100_000 * "[" + 100_000 * "]"
PLOT, COMPARE = ["plot", "r"], ["compare", "e"]
COMMANDS: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "cp of nothing": (lambda: None, ["cp", "nope", "x.yaml"], "no file and no packaged recipe or config named nope"),
    "random over a directory": (
        lambda: None, ["random", "--config", "train.yaml", "--output", "model"], "model exists; choose another"
    ),
    "cp over a file": (lambda: None, ["cp", "smollm2/135M_owlore", "train.yaml"], "train.yaml exists; use --force"),
    "cp to a directory": (lambda: None, ["cp", "smollm2/135M_owlore", "model"], "model is a directory"),
    "cp over a dead link": (
        lambda: Path("link").symlink_to("nowhere"), ["cp", "smollm2/135M_owlore", "link"], "link exists; use --force"
    ),
    "score to a picture": (
        lambda: None, ["score", "--config", "train.yaml", "--output", "s.png"], "a scores file ends in .json"
    ),
    "score over a file": (
        lambda: None, ["score", "--config", "train.yaml", "--output", "train.json"], "train.json exists; use --force"
    ),
    "score over a picture": (
        lambda: Path("s.png").write_text("mine"), ["score", "--config", "train.yaml", "--output", "s.json"],
        "s.png exists; use --force",
    ),
    "memory over a picture": (
        lambda: Path("memory.png").write_text("mine"),
        ["memory", "--config", "train.yaml", "--output", "memory.png"], "memory.png exists; use --force",
    ),
    "memory to no picture": (
        lambda: None, ["memory", "--config", "train.yaml", "--output", "plan"], "--output=plan: a picture ends in .png"
    ),
    "cp below a file": (lambda: None, ["cp", "smollm2/135M_owlore", "train.json/x.yaml"], "train.json/x.yaml: "),
    "cp to a long name": (lambda: None, ["cp", "smollm2/135M_owlore", 300 * "x"], "File name too long"),
    "random of a model with an unknown field": (
        lambda: None, ["random", "--config", "train.yaml", "--output", "tiny", "model.vocab_siz=300"],
        "model: llama2() got an unexpected keyword argument 'vocab_siz'",
    ),
    "memory of no tokens": (lambda: None, ["memory", "--config", "train.yaml", "--seq-len", "0"], "--seq-len=0"),
    "memory on no device": (
        lambda: None, ["memory", "--config", "train.yaml", "--world-size", "0"], "--world-size=0; it must be"
    ),
    "memory of a text": (lambda: None, ["memory", "--config", "train.yaml", "--seq-len", "x"], "invalid int value"),
    "plot of nothing": (lambda: None, ["plot", "/nope"], "/nope is not the output_dir of a training run"),
    "plot of a file": (lambda: None, ["plot", "train.json"], "train.json is not the output_dir of a training run"),
    "compare of nothing": (lambda: None, ["compare", "/nope"], "/nope has no results"),
    "compare of a file": (lambda: None, ["compare", "train.json"], "train.json is not a results file"),
    "plot with a manifest that is a list": (lambda: a_run("manifest.json", "[]"), PLOT, NO_RUN),
    "plot with a manifest that is nested deeply": (lambda: a_run("manifest.json", DEEP), PLOT, "nested too deeply"),
    "plot with a manifest without memory": (lambda: a_run("manifest.json", {"memory_bytes": []}), PLOT, NO_RUN),
    "plot with texts for memory": (
        lambda: a_run("manifest.json", {"memory_bytes": {"planned": {"a": "1"}, "measured": {}}}), PLOT, NO_RUN
    ),
    "plot with huge numbers for memory": (
        lambda: a_run("manifest.json", {"memory_bytes": {"planned": {"a": 10**400}, "measured": {}}}), PLOT, NO_RUN
    ),
    "plot with texts for probabilities": (lambda: a_run("manifest.json", {"probabilities": ["a"]}), PLOT, NO_RUN),
    "plot with too few probabilities": (lambda: a_run("manifest.json", {"probabilities": [1]}), PLOT, NO_RUN),
    "plot with a step beyond 64 bits": (lambda: a_run("steps.jsonl", {"step": 2**63}), PLOT, NO_RUN),
    "plot with scores beyond 64 bits": (lambda: a_run("scores.json", {"scores": [1, 2**63]}), PLOT, NO_RUN),
    "plot with seconds beyond 64 bits": (lambda: a_run("steps.jsonl", {"step_seconds": 10**99}), PLOT, NO_RUN),
    "plot with a list for losses": (lambda: a_run("manifest.json", {"held_out_loss": [1]}), PLOT, NO_RUN),
    "plot with a loss at no step": (lambda: a_run("manifest.json", {"held_out_loss": {"x": 1}}), PLOT, NO_RUN),
    "plot with a text for steps": (lambda: a_run("manifest.json", {"steps": "2"}), PLOT, NO_RUN),
    "plot with a list for the config": (lambda: a_run("manifest.json", {"config": []}), PLOT, NO_RUN),
    "plot with scores that are texts": (lambda: a_run("scores.json", {"scores": ["a", "b"]}), PLOT, NO_RUN),
    "plot with scores that are huge": (lambda: a_run("scores.json", {"scores": [1, 10**400]}), PLOT, NO_RUN),
    "plot without scores": (lambda: a_run("scores.json", "{}"), PLOT, NO_RUN),
    "plot with a step that is a list": (lambda: a_run("steps.jsonl", "[1]\n"), PLOT, NO_RUN),
    "plot with a step without a loss": (lambda: a_run("steps.jsonl", '{"step": 1, "step_seconds": 1}\n'), PLOT, NO_RUN),
    "plot with a text for a loss": (lambda: a_run("steps.jsonl", {"loss": "1"}), PLOT, NO_RUN),
    "plot with a step that is no JSON": (lambda: a_run("steps.jsonl", "{\n"), PLOT, NO_RUN),
    "plot with a draw of texts": (lambda: a_run("draws.jsonl", {"active": ["a"]}), PLOT, NO_RUN),
    "plot with a draw that is nested deeply": (lambda: a_run("draws.jsonl", DEEP + "\n"), PLOT, "nested too deeply"),
    "plot of no user's run": (lambda: None, ["plot", "~nosuchuser/r"], "there is no user nosuchuser"),
    "compare with a list of averages": (lambda: an_evaluation(averages=[1]), COMPARE, NO_RESULTS),
    "compare with a text for averages": (lambda: an_evaluation(averages="x"), COMPARE, NO_RESULTS),
    "compare with huge averages": (lambda: an_evaluation(averages={"acc,none": 10**400}), COMPARE, "is no score"),
    "compare with a list of results": (lambda: an_evaluation(results=[1]), COMPARE, NO_RESULTS),
    "compare with huge scores": (lambda: an_evaluation(results={"t": {"acc,none": 10**400}}), COMPARE, "is no score"),
    "compare with results nested deeply": (lambda: an_evaluation(DEEP), COMPARE, "nested too deeply"),
    "compare with no user's run": (lambda: None, ["compare", "~nosuchuser/e"], "there is no user nosuchuser"),
    "validate no user's file": (
        lambda: None, ["validate", "--config", "~nosuchuser/x.yaml"], "there is no user nosuchuser"
    ),
    "cp to no user's home": (
        lambda: None, ["cp", "smollm2/135M_owlore", "~nosuchuser/x.yaml"], "there is no user nosuchuser"
    ),
    "score to no user's home": (
        lambda: None, ["score", "--config", "train.yaml", "--output", "~nosuchuser/s.json"], "no user nosuchuser"
    ),
    "memory to no user's home": (
        lambda: None, ["memory", "--config", "train.yaml", "--output", "~nosuchuser/m.png"], "no user nosuchuser"
    ),
    "download to no user's home": (
        lambda: None, ["download", "smollm2", "--output-dir", "~nosuchuser/x"], "there is no user nosuchuser"
    ),
    "score of a model of other heads": (
        lambda: None, ["score", "--config", "train.yaml", "model.num_heads=2", "model.num_kv_heads=1"],
        "builder has num_attention_heads=2, and config.json has 4",
    ),
    "download into a directory": (
        lambda: nonempty("full"), ["download", "smollm2", "--output-dir", "full"], "full exists and is not SmolLM2-135M"
    ),
    "download into another model": (
        lambda: None, ["download", "smollm2", "--output-dir", "model"], "model exists and is not SmolLM2-135M"
    ),
    "download onto a file": (
        lambda: None, ["download", "smollm2", "--output-dir", "train.json"], "train.json exists and is not"
    ),
    "download of another model": (lambda: None, ["download", "llama"], "invalid choice: 'llama'"),
    "validate nothing": (lambda: None, ["validate", "--config", "/nope.yaml"], "no file and no packaged config"),
    "validate an empty file": (
        lambda: Path("empty.yaml").write_text(""), ["validate", "--config", "empty.yaml"], "empty.yaml is empty"
    ),
    "validate comments": (
        lambda: Path("empty.yaml").write_text("# only\n"), ["validate", "--config", "empty.yaml"], "is empty"
    ),
    "validate of no recipe": (
        lambda: Path("other.yaml").write_text("a: {_component_: os.system}\n"),
        ["validate", "--config", "other.yaml"], "no recipe takes it",
    ),
    "validate with a wrong override": (
        lambda: None, ["validate", "--config", "train.yaml", "batch_size"], "is not of the form field=value"
    ),
    "an unknown option": (lambda: None, ["validate", "--config", "train.yaml", "--nope"], "unrecognized arguments"),
    "an unknown command": (lambda: None, ["nope"], "invalid choice: 'nope'"),
}  # fmt: skip


@pytest.mark.pictures
@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command(case, place, capsys, monkeypatch):
    spoil, arguments, message = COMMANDS[case]
    spoil()
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    assert message in refused(cli.main, arguments, capsys, monkeypatch)
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before
