"""Every shipped config is valid, and every bad value is rejected with a one-line error."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from places import refused

from owlore_tune import cli
from owlore_tune.config.components import changed_fields, check_config, device_and_dtype
from owlore_tune.config.load import expanded, find_config, load_config, packaged_configs, with_bases
from owlore_tune.distributed.world import World
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


def test_the_base_lists_every_field_with_its_default():
    cfg = OmegaConf.to_container(OmegaConf.load(find_config("base")), resolve=False)
    assert cfg.keys() == {*REQUIRED, *DEFAULTS}
    assert cfg["owlore"] == dataclasses.asdict(OwLoreConfig())
    assert {key: cfg[key] for key in DEFAULTS} == DEFAULTS


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
    "evaluation": ("eval/local_choices", "scorng=generate", "unknown key scorng; did you mean scoring"),
    "torchtune's recipe": ("smollm2/135M_lora", "model.lora_rnk=4", "unknown key model.lora_rnk; did you mean lora_ra"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_config_is_told_in_one_line(case, monkeypatch, capsys):
    name, override, message = INVALID[case]
    assert message in refused(cli.main, ["validate", "--config", name, override], capsys, monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_opens_with_its_download(name):
    assert "Download" in find_config(name).read_text().split("\n\n")[0]


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


@pytest.mark.parametrize("base", ["one.yaml", "two.yaml"])
def test_bases_that_lead_back_are_refused(base, tmp_path):
    write_config(tmp_path / "two.yaml", base="one.yaml")
    one = write_config(tmp_path / "one.yaml", base=base)
    with pytest.raises(ConfigError, match=r"base=one.yaml leads back to .*one.yaml; remove one of these bases"):
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
        prepare(on_cuda, build_trained_model(settings), None, World())
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
