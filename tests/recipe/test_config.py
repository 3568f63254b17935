"""Every shipped config is valid, and every bad value is rejected with a one-line error."""

import dataclasses
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from owlore_tune import cli
from owlore_tune.config.components import changed_fields, check_config, device_and_dtype
from owlore_tune.config.load import expanded, find_config, load_config, packaged_configs, with_bases
from owlore_tune.errors import ConfigError
from owlore_tune.training.components import build_trained_model, prepare
from owlore_tune.training.config import DEFAULTS, REQUIRED, SUPPLIED, OwLoreConfig, TrainingSettings
from owlore_tune.training.plan import plan_run

CONFIGS = [name for name, _ in packaged_configs()]
EVALS = [name for name in CONFIGS if name.startswith("eval/")]
ANY = "hf/any"  # has no model of its own
# All other configs are for torchtune's recipes.
OURS = [name for name in CONFIGS if not name.endswith(("_lora", "_generate")) and name not in (*EVALS, ANY)]


MEMORY = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
# config, GPUs, rows × tokens, GB
PLANNED = re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) × (\d+) \| ([\d.]+) \|$", MEMORY, re.MULTILINE)


def test_every_config_is_in_the_table_of_planned_memory():
    assert {name for name, *_ in PLANNED} == set(OURS)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if row[:2] == ("llama2/7B_owlore", "1") else [pytest.mark.slow]) for row in PLANNED],
    ids=lambda row: f"{row[0]}-{row[1]}",
)
def test_the_table_of_planned_memory(row):
    name, num_gpus, batch_size, seq_len, told = row
    settings = TrainingSettings.from_config(load_config(name, ["device=cpu"])).for_gpu()
    assert (int(batch_size), int(seq_len)) == (settings.cfg.batch_size, settings.cfg.tokenizer.max_seq_len)
    sharding = settings.sharding(int(num_gpus)) if int(num_gpus) > 1 else None
    plan = plan_run(settings, int(seq_len), sharding)
    assert plan.total / 1e9 == pytest.approx(float(told), abs=0.06)


def test_the_table_of_settings_for_cards_has_every_packaged_model():
    rows = re.findall(r"^\| `(\S+)` \| \d+ (?:\| [^|]+){6}\|$", MEMORY, re.MULTILINE)
    assert rows == [name for name, _ in packaged_configs() if name.endswith("_owlore")]


@pytest.mark.slow
def test_the_table_of_settings_that_fit_a_card(monkeypatch):
    """One of its rows, because each takes many plans."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from fit import row

    (line,) = [line for line in MEMORY.splitlines() if line.startswith("| `llama3_2/1B_owlore` | 16 |")]
    assert row("llama3_2/1B_owlore") == line


REFERENCES = ("smollm2/135M_owlore", "llama2/7B_owlore")


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_config_lists_every_field_with_its_default(name):
    """A comment after each non-default value names the default."""
    file = find_config(name)
    cfg = OmegaConf.load(file)
    assert cfg.keys() == {*REQUIRED, *DEFAULTS}
    lines = file.read_text().splitlines()

    def check(key: str, value, default, indent: str = "") -> None:
        (line,) = [line for line in lines if line.startswith(f"{indent}{key}:")]
        told = re.search(r"\(default (.+)\)", line)
        if value == default:
            assert told is None, line
        else:
            assert told is not None and OmegaConf.create(f"x: {told[1]}").x == default, line

    owlore = dataclasses.asdict(OwLoreConfig())
    assert cfg.owlore.keys() == owlore.keys()
    parameters = inspect.signature(torch.optim.AdamW).parameters
    optimizer = {key: parameters[key].default for key in cfg.optimizer if key != "_component_"}
    for block, defaults in (("owlore", owlore), ("optimizer", optimizer)):
        for key, default in defaults.items():
            check(key, cfg[block][key], list(default) if isinstance(default, tuple) else default, "  ")
    for key, default in DEFAULTS.items():
        value = OmegaConf.to_container(cfg, resolve=False)[key]
        check(key, value, default)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_is_valid(name, monkeypatch, capsys, tmp_path, tiny_dir):
    """`owlore validate` needs no downloads and writes no files, except for a model that only its directory knows."""
    monkeypatch.chdir(tmp_path)
    needed = [f"checkpointer.checkpoint_dir={tiny_dir}", "owlore.num_active_layers=2", "owlore.rank=8"]
    monkeypatch.setattr(sys, "argv", ["owlore", "validate", "--config", name, *(needed if name == ANY else ())])
    cli.main()
    assert capsys.readouterr().out.endswith(f"{name} is valid\n")
    assert list(tmp_path.iterdir()) == []


INVALID = {
    "training": ("llama2/7B_owlore", "owlore.num_active_layers=33", "num_active_layers=33; the model has 32 layers"),
    "evaluation": ("eval/mmlu", "num_fewshots=5", "unknown key num_fewshots; did you mean num_fewshot"),
    "torchtune's recipe": (
        "smollm2/135M_lora",
        "model.lora_rnk=4",
        "unknown key model.lora_rnk; did you mean lora_rank",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_config_is_told_in_one_line(case, monkeypatch):
    name, override, message = INVALID[case]
    monkeypatch.setattr(sys, "argv", ["owlore", "validate", "--config", name, override])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_opens_with_its_download_and_launch(name):
    head = find_config(name).read_text().split("\n\n")[0]
    assert "Download" in head
    assert "Launch" in head
    assert name in head


# Fields that may differ between a method's config and the model's OwLore config; all others must match.
METHODS = {
    "owlore": set(),
    "owlore_full_rank": {"owlore.rank", "optimizer.lr", "optimizer.betas", "optimizer.eps"},
    "lisa": {"owlore.num_active_layers", "owlore.resample_every", "owlore.score", "owlore.train_embeddings",
             "owlore.train_output", "owlore.train_norm", "owlore.rank", "optimizer.lr", "optimizer.betas",
             "optimizer.eps", "optimizer.fused", "optimizer._component_", "optimizer.bf16_stochastic_round"},
    "galore": {"owlore.num_active_layers", "owlore.score", "owlore.train_embeddings", "owlore.train_output",
               "owlore.train_norm", "owlore.side", "owlore.rank", "optimizer.lr", "optimizer.betas", "optimizer.eps"},
    "full": {"owlore.num_active_layers", "owlore.score", "owlore.train_embeddings", "owlore.train_output",
             "owlore.train_norm", "owlore.rank", "optimizer.lr", "optimizer.betas", "optimizer.eps"},
}  # fmt: skip
# Fields that may differ between a model's OwLore config and that of LLaMA-2-7B.
MODEL_FIELDS = {
    "model", "tokenizer", "checkpointer", "batch_size", "gradient_accumulation_steps", "dist_timeout_s",
    "enable_activation_checkpointing",
}  # fmt: skip


@cache
def filled_in(name: str) -> dict:
    """A config with all its defaults."""
    cfg = OmegaConf.to_container(TrainingSettings.from_config(load_config(name, ["device=cpu"])).cfg)
    cfg["dataset"] = {key: value for key, value in cfg["dataset"].items() if value not in (None, False)}
    return cfg


def changed(one: str, other: str, depth: int) -> set[str]:
    """Return the fields that differ between two configs, by the first ``depth`` parts of their paths."""
    paths = {change.split("=")[0] for change in changed_fields(filled_in(one), filled_in(other))}
    return {".".join(path.split(".")[:depth]) for path in paths if path.split(".")[0] != "output_dir"}


@pytest.mark.parametrize("name", OURS)
def test_a_config_differs_in_its_model_or_method_alone(name):
    (method,) = [known for known in METHODS if name.endswith(f"_{known}")]
    own = f"{name.removesuffix(f'_{method}')}_owlore"
    assert changed(own, name, 2) <= METHODS[method]
    if not name.startswith("smollm2/"):
        unpacked = {"dataset"} if name.startswith("gemma2/") else set()  # torchtune's Gemma 2 takes no block masks
        assert changed("llama2/7B_owlore", own, 1) <= MODEL_FIELDS | {"owlore", "optimizer"} | unpacked
        written_out = {f"optimizer.{key}" for key in ("betas", "eps")}  # torch's defaults
        allowed = {"owlore.rank"} | written_out
        assert {path for path in changed("llama2/7B_owlore", own, 2) if path.startswith("o")} <= allowed


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_a_config_has_the_fields_of_its_bases(name, tmp_path):
    text = expanded([file for file, _ in with_bases(name)])
    copied = tmp_path / "copy.yaml"
    copied.write_text(text)
    assert load_config(str(copied)) == load_config(name)
    if "\nbase: " not in find_config(name).read_text():
        assert text == find_config(name).read_text()
    else:
        assert "base" not in OmegaConf.load(copied)
        assert text.count("  # ") > 14  # comments of the bases


def write_config(file: Path, **fields) -> str:
    file.parent.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(fields), file)
    return str(file)


def test_a_file_changes_fields_of_its_base(tmp_path):
    """A block with another component replaces the block of the base. Bases are packaged, or files beside this one."""
    write_config(
        tmp_path / "mine" / "first.yaml",
        base="smollm2/135M_owlore",
        output_dir="elsewhere",
        owlore={"rank": 16},
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.1},
        dataset_val=None,
    )
    second = write_config(tmp_path / "mine" / "second.yaml", base="first.yaml", owlore={"score": "uniform"})
    packaged, mine = load_config("smollm2/135M_owlore"), load_config(second, ["owlore.update_gap=7"])
    assert mine.keys() == packaged.keys() and mine.output_dir == "elsewhere" and mine.dataset_val is None
    assert mine.owlore == packaged.owlore | {"rank": 16, "score": "uniform", "update_gap": 7}
    assert mine.optimizer == {"_component_": "torch.optim.SGD", "lr": 0.1}
    assert mine.tokenizer == packaged.tokenizer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "nowhere/7B"}, r"one.yaml: base=nowhere/7B; no file and no packaged config named nowhere/7B"),
        ({"base": 5}, "one.yaml: base=5; it must be str"),
        ({"base": "one.yaml"}, r"one.yaml: base=one.yaml leads back to .*one.yaml; remove one of these bases"),
        ({"base": "two.yaml"}, r"two.yaml: base=one.yaml leads back to .*one.yaml; remove one of these bases"),
    ],
)
def test_a_wrong_base_is_refused(fields, message, tmp_path):
    write_config(tmp_path / "two.yaml", base="one.yaml")
    one = write_config(tmp_path / "one.yaml", **fields)
    with pytest.raises(ConfigError, match=message):
        load_config(one)


def test_null_on_the_command_line_removes_a_component(tiny_config):
    tiny_config["dataset_val"] = {"_component_": None}
    cfg = check_config(OmegaConf.create(tiny_config), REQUIRED, DEFAULTS, SUPPLIED)
    assert cfg.dataset_val is None


def test_a_list_of_datasets_is_checked_too(tiny_config):
    tiny_config["dataset"] = [tiny_config["dataset"], tiny_config["dataset"] | {"packd": True}]
    with pytest.raises(ConfigError, match=r"unknown key dataset\.1\.packd; did you mean packed"):
        check_config(OmegaConf.create(tiny_config), REQUIRED, DEFAULTS, SUPPLIED)


def test_a_value_that_is_left_open_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"Missing mandatory value: epochs; give it as epochs=VALUE"):
        TrainingSettings.from_config(OmegaConf.create(tiny_config | {"epochs": "???"}))


def test_a_block_without_a_component_changes_fields_of_the_default_one():
    overrides = ["profiler.enabled=true", "metric_logger.log_dir=elsewhere", "loss.chunk_size=64"]
    cfg = TrainingSettings.from_config(load_config("smollm2/135M_full", overrides)).cfg
    assert cfg.profiler._component_ == "torchtune.training.setup_torch_profiler"
    assert (cfg.metric_logger._component_.rpartition(".")[2], cfg.metric_logger.log_dir) == ("DiskLogger", "elsewhere")
    assert cfg.loss == {"_component_": "owlore_tune.loss.LinearCrossEntropyLoss", "chunk_size": 64}


def test_a_default_that_is_written_out_is_the_same_config(tiny_config):
    """So a run may resume with a config that states a default, and notices if a later release changes one."""
    implicit = tiny_config | {"owlore": {"num_active_layers": 2}}
    explicit = tiny_config | {"owlore": {"num_active_layers": 2, "resample_every": 50, "rank": 128}}
    one, other = (TrainingSettings.from_config(OmegaConf.create(config)).cfg for config in (implicit, explicit))
    assert changed_fields(OmegaConf.to_container(one), OmegaConf.to_container(other)) == []


def test_an_evaluation_of_data_files_alone_is_validated(monkeypatch, tmp_path):
    config = OmegaConf.load(find_config("eval/local_choices"))
    del config.tasks
    config.scorng = "generate"
    OmegaConf.save(config, tmp_path / "eval.yaml")
    overrides = ["data_files.mine=mine.json"]
    monkeypatch.setattr(sys, "argv", ["owlore", "validate", "--config", str(tmp_path / "eval.yaml"), *overrides])
    with pytest.raises(SystemExit, match="unknown key scorng; did you mean scoring"):
        cli.main()


def test_overrides_and_files(tmp_path):
    cfg = load_config("smollm2/135M_owlore", ["owlore.num_active_layers=2", "owlore.rank=null"])
    assert cfg.owlore.num_active_layers == 2
    assert cfg.owlore.rank is None
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert load_config(str(tmp_path / "mine.yaml")).a == 1
    with pytest.raises(
        ConfigError, match="no file and no packaged config named smolm2/135M_owlore; available: smollm2"
    ):
        find_config("smolm2/135M_owlore")


def test_a_dtype_that_is_not_given_depends_on_the_device(monkeypatch):
    cfg = OmegaConf.create({"device": None, "dtype": None})
    for device, dtype in (("cpu", "fp32"), ("cuda", "bf16")):
        monkeypatch.setattr("torchtune.utils.get_device", lambda name, device=device: torch.device(device))
        monkeypatch.setattr("torchtune.training.get_dtype", lambda name, device: name)
        assert device_and_dtype(cfg) == (torch.device(device), dtype)


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "high"), ("fp32", "highest")])
def test_only_thin_products_on_a_gpu_have_tf32(dtype, precision, tiny_config):
    """A run in float32 keeps its products in float32."""
    settings = TrainingSettings.from_config(OmegaConf.create(tiny_config | {"dtype": dtype}))
    on_cuda = dataclasses.replace(settings, device=torch.device("cuda"))
    try:
        prepare(on_cuda, build_trained_model(settings), None, ALONE)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
