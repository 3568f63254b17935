"""A user copies, moves and replaces the files of a run, and kills it between two operations on files."""

import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
from places import with_json
from tiny import TINY_MODEL, save_tokenizer

from owlore_tune.checkpoints.steps import StepCheckpoints
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.files import cache_directory, files_digest, partial_name, write_json
from owlore_tune.training.output_dir import RUN_FILE
from owlore_tune.training.records import Records, read_records
from runs import Killed, assert_resumes_exactly, checkpoints, finetune, finetune_until, prepare, variant


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_run_that_was_killed_before_it_pruned_prunes_when_it_resumes(tiny_config, monkeypatch):
    config = variant(tiny_config, "kept", save_every_n_steps=2, keep_last_n=1, dataset_val=None)
    recipe = prepare(config)
    keep_last = StepCheckpoints.keep_last

    def killed(self, count):
        if recipe.progress.step == 10:
            raise Killed
        keep_last(self, count)

    monkeypatch.setattr(StepCheckpoints, "keep_last", killed)
    with pytest.raises(Killed):
        recipe.train()
    recipe.cleanup()
    monkeypatch.undo()
    assert [directory.name for directory in checkpoints(config)] == ["step_8", "step_10"]
    finetune(config | {"resume_from_checkpoint": True})
    assert [directory.name for directory in checkpoints(config)] == ["step_10"]


def test_leftovers_of_a_kill_in_a_write_are_removed_and_files_of_the_users_stay(tiny_config, tmp_path):
    config = variant(tiny_config, "left", max_steps_per_epoch=2, dataset_val=None)
    output_dir = Path(config["output_dir"])
    output_dir.mkdir()
    before_the_run = output_dir / partial_name(RUN_FILE, 4 * "01234567")
    before_the_run.write_text("{")
    mine = output_dir / f".{RUN_FILE}.backup"
    mine.write_text("mine")
    finetune(config)
    assert not before_the_run.exists() and mine.read_text() == "mine"
    run_id = json.loads((output_dir / RUN_FILE).read_text())["run_id"]
    leftover = output_dir / partial_name("manifest.json", run_id)
    leftover.write_text("{")
    other = output_dir / partial_name("manifest.json", 4 * "89abcdef")
    other.write_text("of another run")
    finetune(config | {"resume_from_checkpoint": True})
    assert not leftover.exists() and other.read_text() == "of another run"
    assert not [name for name in names(output_dir) if name.endswith(".partial") and name != other.name]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1}, "owner")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()}, "owner")
    assert names(tmp_path) == {"a.json"} and json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_checkpoints_have_the_tokenizer_that_trained(weights, tiny_config, tiny_dir, tmp_path):
    other = tmp_path / "tokenizer"
    save_tokenizer(other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|end|>", "<|end|> ")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    config = variant(tiny_config, "other", max_steps_per_epoch=2, dataset_val=None)
    config["owlore"]["weights"] = weights
    config["tokenizer"]["path"] = str(other)
    finetune(config)
    tokenizers = [HFChatTokenizer(str(path)) for path in (checkpoints(config)[-1], other, tiny_dir)]
    digests = [tokenizer.digests()["chat template"] for tokenizer in tokenizers]
    assert digests[0] == digests[1] != digests[2]
    assert tokenizers[0].special_tokens == tokenizers[1].special_tokens


def test_a_model_and_data_that_were_moved_can_go_on_and_changed_ones_cannot(tiny_config, tiny_dir, tiny_data, tmp_path):
    config = variant(tiny_config, "moved", save_every_n_steps=4, dataset_val=None)
    finetune_until(config, 5)
    shutil.copytree(tiny_dir, tmp_path / "new place" / "model")
    shutil.copy(tiny_data, tmp_path / "new place" / "data.json")
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "new place" / "model")
    config["tokenizer"]["path"] = str(tmp_path / "new place" / "model")
    config["dataset"]["data_files"] = str(tmp_path / "new place" / "data.json")
    assert_resumes_exactly(config)
    with_json(str(tmp_path / "new place" / "model" / "config.json"), initializer_range=0.03)
    with pytest.raises(ConfigError, match="config.json changed since .* was saved"):
        prepare(config | {"resume_from_checkpoint": True})


def test_a_setting_of_the_environment_that_changed_is_told_without_its_value(tiny_config, monkeypatch):
    monkeypatch.setenv("LR_OF_A_TEST", "0.0003")
    config = variant(tiny_config, "environment", save_every_n_steps=4, dataset_val=None)
    config["optimizer"]["lr"] = "${oc.decode:${oc.env:LR_OF_A_TEST}}"
    finetune(config)
    monkeypatch.setenv("LR_OF_A_TEST", "0.0007")
    resumed = config | {"resume_from_checkpoint": True}
    with pytest.raises(ConfigError, match="the value of optimizer.lr, which comes from .* environment") as error:
        prepare(resumed)
    assert "0.0007" not in str(error.value) and "0.0003" not in str(error.value)
    monkeypatch.setenv("LR_OF_A_TEST", "0.0003")
    finetune(resumed)


def test_a_run_in_which_no_token_trains_fails(tiny_config, monkeypatch):
    """Every prompt is longer than the rows, so every answer is cut off, and the rows that are checked are others."""
    monkeypatch.setattr("owlore_tune.training.components.check_labels", lambda *arguments: None)
    config = variant(tiny_config, "cut", dataset_val=None)
    config["tokenizer"]["max_seq_len"] = 3
    with pytest.raises(RunError, match="no token was trained in any step: .*raise tokenizer.max_seq_len, which is 3"):
        finetune(config)
    manifest = json.loads((Path(config["output_dir"]) / "manifest.json").read_text())
    assert manifest["finished"] is False


def test_a_logger_that_writes_the_config_writes_it_to_the_run(tiny_config, tmp_path, monkeypatch):
    """As torchtune's loggers of services do. The values of environment variables stay out of the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE_OF_A_TEST", str(tmp_path / "secret"))
    output_dir, logger = "${oc.env:PLACE_OF_A_TEST}/run", {"_component_": "runs.SavingLogger"}
    prepare(tiny_config | {"output_dir": output_dir, "metric_logger": logger}).cleanup()
    config = (tmp_path / "secret" / "run" / "torchtune_config.yaml").read_text()
    assert "max_steps_per_epoch" in config and [path.name for path in tmp_path.glob("$*")] == []


def test_a_log_on_a_full_disk_does_not_end_the_run(tiny_config, tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    logger = {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(tmp_path)}
    config = variant(tiny_config, "full", metric_logger=logger | {"filename": "log.txt"})
    finetune(config)
    assert json.loads((Path(config["output_dir"]) / "manifest.json").read_text())["finished"]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tiny_config, capsys, monkeypatch):
    def full_disk(run):
        raise OSError("No space left on device")

    monkeypatch.setattr("owlore_tune.training.plots.plot_run", full_disk)
    finetune(tiny_config)
    assert "pictures        cannot be drawn: No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_others_may_read_all_files_of_a_checkpoint_that_the_umask_lets_them(weights, tiny_config):
    """safetensors gives its files to their owner alone."""
    config = variant(tiny_config, "modes", dataset_val=None, owlore__weights=weights)
    finetune(config)
    allowed = ~os.umask(0o077)
    os.umask(~allowed & 0o777)
    for file in checkpoints(config)[-1].iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o044 == allowed & 0o044, file


def test_a_record_that_a_full_disk_cuts_leaves_whole_lines(tmp_path):
    records = Records(tmp_path)
    records.start(0, "run")
    records.open_draw(0, [1], 10)
    record = {"step": 1, "step_seconds": 1.0, "refresh_seconds": 0.0}
    records.add_step(record)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "steps.jsonl").stat().st_size + 5, limits[1]))
    try:
        records.add_step(record | {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    records.add_step(record | {"step": 3})
    assert [step["step"] for step in read_records(tmp_path / "steps.jsonl")] == [1, 3]


def test_records_that_a_crash_of_the_machine_has_left_do_not_stop_a_resumed_run(tmp_path):
    good = '{"step": 1, "step_seconds": 1.0, "tokens_per_second": 5.0}\n'
    (tmp_path / "steps.jsonl").write_bytes(good.encode() + b"\0\0\0\n" + good.replace("1,", "2,", 1).encode() + b'{"st')
    records = Records(tmp_path)
    records.start(1, "run")
    assert (tmp_path / "steps.jsonl").read_text() == good
    assert records.speed() == {"median_step_seconds": 1.0, "tokens_per_second": 5.0}


def test_a_user_without_a_home_has_no_cache(monkeypatch, tmp_path):
    """A run needs none. A cache among temporary files could be another user's."""
    (tmp_path / "file").write_text("content")
    expected = files_digest([tmp_path / "file"])
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no home directory for a cache; set XDG_CACHE_HOME=DIR"):
        cache_directory()
    assert files_digest([tmp_path / "file"]) == expected and names(tmp_path) == {"file"}


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_processes():
    saved, resumed = Records(None), Records(None)
    saved.add_seconds("load", 2.0)
    saved.add_seconds("train", 5.0)
    resumed.add_seconds("load", 1.0)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.seconds == {"load": 3.0, "train": 5.0}


def test_a_tied_head_that_alone_should_train_is_refused(tiny_config):
    tiny_config["model"] = TINY_MODEL | {"_component_": "torchtune.models.llama3_2.llama3_2"}
    tiny_config["owlore"]["train_output"] = True
    with pytest.raises(ConfigError, match="train_output=true trains nothing, because the model's head is its embedd"):
        prepare(tiny_config)
