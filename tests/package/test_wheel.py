"""The installed wheel works without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from owlore_tune.config.load import RECIPES, packaged_configs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel, before the checkout on Python's path."""
    scratch = tmp_path_factory.mktemp("wheel")
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, ROOT]
    subprocess.run([sys.executable, "-m", "pip", *wheel], check=True)
    (built,) = scratch.glob("owlore_tune-*.whl")
    install = ["install", "--quiet", "--no-deps", "--target", scratch / "site", built]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return scratch / "site"


def run(command: list[str], installed: Path, cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": path}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_the_wheel_has_every_recipe_and_config(installed, tmp_path):
    listed = run([str(installed / "bin" / "owlore"), "ls"], installed, tmp_path)
    names = {line.split()[1] for line in listed.splitlines()}
    assert names == {*RECIPES, *(name for name, _ in packaged_configs())}
    where = run(
        [sys.executable, "-c", "import owlore_tune, owlore_configs; print(owlore_tune.__file__)"], installed, tmp_path
    )
    assert where.startswith(str(installed))
    # An editable install of the checkout would supply missing modules to the commands above.
    sources = {file.relative_to(ROOT) for file in (ROOT / "owlore_tune").rglob("*.py")}
    assert {file.relative_to(installed) for file in (installed / "owlore_tune").rglob("*.py")} == sources
    assert len(list((installed / "owlore_evals").glob("*.py"))) == len(list((ROOT / "eval").glob("*.py")))
    assert not (installed / "tests").exists() and not (installed / "recipes").exists()


def test_training_by_name_from_the_wheel(installed, tmp_path, smollm2_dir):
    command = ["tune", "run", "owlore_full_finetune", "--config", "smollm2/135M_owlore", "max_steps_per_epoch=3"]
    overrides = ["dataset_val=null", "owlore.calibration_batches=1", "batch_size=1", "output_dir=run"]
    run([*command, *overrides, f"checkpointer.checkpoint_dir={smollm2_dir}"], installed, tmp_path)
    assert (tmp_path / "run" / "step_3" / "model.safetensors").is_file()
