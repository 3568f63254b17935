"""Wrong files and commands: a one-line error names the file or value before weights load, and nothing is changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from places import refused, rewrite, with_json

import owlore_full_finetune
from owlore_tune import cli

DEEP = 100_000 * "[" + 100_000 * "]"


def write(name: str, text: str) -> Callable[[], object]:
    def write_file() -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)

    return write_file


def change(name: str, **fields) -> Callable[[], object]:
    return lambda: with_json(f"model/{name}.json", **fields)


def scores(values: list) -> Callable[[], object]:
    """Write a scores file, and name it in the config."""

    def write_scores() -> None:
        content = {"scores": values, "score": "outlier", "fingerprint": "x", "options": {"threshold": 13.0}}
        Path("s.json").write_text(json.dumps(content))
        config = OmegaConf.load("train.yaml")
        config.owlore.scores_file = "s.json"
        OmegaConf.save(config, "train.yaml")

    return write_scores


EVALUATION = json.dumps({"kind": "evaluation", "run_id": 4 * "01234567", "parent": None})
FILES: dict[str, tuple[Callable[[], object], str]] = {
    "no config": (lambda: Path("train.yaml").unlink(), "no file and no packaged config named train.yaml"),
    "a config that is a list": (write("train.yaml", "- 1\n- 2\n"), "not a mapping of fields"),
    "a config that is not YAML": (write("train.yaml", "a: [1\nb: }"), "cannot be read as YAML"),
    "a number for a key": (lambda: rewrite("train.yaml", lambda text: text + "\n5: 1\n"), "the key 5"),
    "a NUL": (
        lambda: rewrite("train.yaml", lambda text: text.replace("output_dir: run", 'output_dir: "a\\0b"')),
        "output_dir='a\\x00b' has a NUL character",
    ),
    "weights that are text": (write("model/model.safetensors", "x"), "model.safetensors cannot be read"),
    "an index without a map": (write("model/model.safetensors.index.json", "{}"), "has no readable weight_map"),
    "an index of a file elsewhere": (
        write("model/model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
        "names ../x.safetensors",
    ),
    "a config.json that is nested deeply": (write("model/config.json", DEEP), "it is nested too deeply"),
    "a config.json without heads": (change("config", num_attention_heads=None), "config.json lacks"),
    "another model": (change("config", rms_norm_eps=0.1), "builder has rms_norm_eps=1e-05, and config.json has"),
    "the directory of a run": (
        lambda: (Path("model/tokenizer.json").unlink(), *(Path("model", f"step_{n}").mkdir() for n in (3, 20))),
        "has no tokenizer.json; name a checkpoint in it, such as model/step_20",
    ),
    "a broken tokenizer": (write("model/tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    "a tokenizer with more ids": (
        lambda: (
            with_json("model/config.json", vocab_size=290),
            rewrite("train.yaml", lambda text: text.replace("vocab_size: 300", "vocab_size: 290")),
        ),
        "token ids up to 299, and the model has embeddings for 290 tokens",
    ),
    "an unknown special token": (change("tokenizer_config", eos_token="<none>"), "is not in the vocabulary"),
    "no template": (change("tokenizer_config", chat_template=None), "set tokenizer.chat_template=plain"),
    "a failing template": (change("tokenizer_config", chat_template="{{ 1/0 }}"), "row 0: the chat template rejects"),
    "no data": (write("train.json", "[]"), "dataset.data_files=train.json is empty"),
    "a broken line": (write("train.json", '{"output": "b"}\n\n\n{"instr\n'), "train.json is not JSON: line 4:"),
    "a row that lacks a field": (write("train.json", '[{"instruction": "a"}]'), "row 0 has no text in field 'output'"),
    "half a surrogate pair": (
        write("train.json", '[{"instruction": "a", "output": "\\ud800"}]'),
        "row 0 has an unpaired surrogate in field 'output'",
    ),
    "scores of other weights": (scores([1.0] * 4), "was made for other weights (x"),
    "huge scores": (scores([10**400] * 4), "the score of layer 0 is 1000000000"),
    "a user's manifest": (write("run/manifest.json", "mine"), "run has manifest.json, which this run did not make"),
    "a user's step_7": (lambda: Path("run/step_7").mkdir(parents=True), "run has step_7, which this run did not make"),
    "another program's run.json": (write("run/run.json", "{}"), "run.json cannot be read"),
    "another lock file": (write("run/.owlore.lock", "my notes"), ".owlore.lock is not a lock"),
    "an evaluation's output_dir": (write("run/run.json", EVALUATION), "holds the evaluation of 01234567"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file(case, place, capsys, monkeypatch):
    spoil, message = FILES[case]
    spoil()
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    line = refused(owlore_full_finetune.recipe_main, ["--config", "train.yaml"], capsys, monkeypatch)
    assert message in line
    assert all(file.read_bytes() == content for file, content in before.items())


SCORE, MEMORY = ["score", "--config", "train.yaml"], ["memory", "--config", "train.yaml"]
CP = ["cp", "smollm2/135M_owlore"]
COMMANDS: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "cp over a dead link": (lambda: Path("link").symlink_to("no"), [*CP, "link"], "link exists; use --force"),
    "cp below a file": (lambda: None, [*CP, "train.json/x.yaml"], "train.json/x.yaml: "),
    "cp to no user's home": (lambda: None, [*CP, "~nosuchuser/x.yaml"], "there is no user nosuchuser"),
    "score over a file": (lambda: None, [*SCORE, "--output", "train.json"], "train.json exists; use --force"),
    "score over a picture": (write("s.png", "mine"), [*SCORE, "--output", "s.json"], "s.png exists; use --force"),
    "score of another model": (lambda: None, [*SCORE, "model.norm_eps=0.1"], "builder has rms_norm_eps=0.1, and conf"),
    "memory over a picture": (write("m.png", "mine"), [*MEMORY, "--output", "m.png"], "m.png exists; use --force"),
    "memory to no picture": (lambda: None, [*MEMORY, "--output", "plan"], "--output=plan: a picture ends in .png"),
    "memory of no tokens": (lambda: None, [*MEMORY, "--seq-len", "0"], "--seq-len=0; it must be"),
    "plot of a wrong file": (write("r/manifest.json", "[]"), ["plot", "r"], "r is not the output_dir of a training"),
    "compare of nothing": (lambda: None, ["compare", "/nope"], "/nope has no results"),
    "compare of huge scores": (
        write("e/results_1.json", json.dumps({"results": {"t": {"acc,none": 10**400}}})), ["compare", "e"],
        "is no score",
    ),
    "download into a model": (
        lambda: None, ["download", "smollm2", "--output-dir", "model"], "model exists and is not SmolLM2-135M"
    ),
    "validate of no recipe": (
        write("other.yaml", "a: {_component_: os.system}\n"), ["validate", "--config", "other.yaml"],
        "no recipe takes it",
    ),
}  # fmt: skip


@pytest.mark.pictures
@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command(case, place, capsys, monkeypatch):
    spoil, arguments, message = COMMANDS[case]
    spoil()
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    assert message in refused(cli.main, arguments, capsys, monkeypatch)
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before
