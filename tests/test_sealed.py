import json
import os
import shutil
import subprocess

import pytest

from owlore_tune.sealed import SEAL, CheckpointError, discard, remove_leftovers, sealed_directory, verify


def write(directory, num_bytes=10, content=b"x" * 1000):
    with sealed_directory(directory, num_bytes) as partial:
        (partial / "weights").write_bytes(content)
        (partial / "config").write_text("{}")
        assert not directory.exists() or (directory / SEAL).exists()


def test_a_directory_appears_whole(tmp_path):
    write(tmp_path / "step_1")
    verify(tmp_path / "step_1")
    assert sorted(p.name for p in (tmp_path / "step_1").iterdir()) == [SEAL, "config", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_it_takes_the_place_of_an_older_one(tmp_path):
    write(tmp_path / "step_1")
    write(tmp_path / "step_1", content=b"y")
    assert (tmp_path / "step_1" / "weights").read_bytes() == b"y"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), sealed_directory(tmp_path / "step_1", 10) as partial:
        (partial / "weights").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: os.truncate(d / "weights", 400), "weights has 400 bytes, not 1,000"),
        (lambda d: (d / "weights").write_bytes(b"x" * 999 + b"y"), "weights is damaged"),
        (lambda d: (d / "weights").unlink(), "weights is missing"),
        (lambda d: (d / SEAL).unlink(), f"{SEAL} cannot be read"),
        (lambda d: (d / SEAL).write_text('{"format"'), f"{SEAL} cannot be read"),
    ],
    ids=["truncated", "flipped", "missing", "no seal", "half a seal"],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    write(tmp_path / "step_1")
    damage(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "step_1")


def test_a_flipped_bit_of_the_seal_never_passes_or_crashes(tmp_path):
    write(tmp_path / "step_1")
    seal = tmp_path / "step_1" / SEAL
    content = seal.read_bytes()
    for i in range(len(content)):
        for bit in range(8):
            seal.write_bytes(content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])
            try:
                verify(tmp_path / "step_1")
            except CheckpointError:
                continue
            # What passes still says the same of every file.
            assert json.loads(seal.read_text())["files"] == json.loads(content)["files"]


def test_leftovers_are_removed(tmp_path):
    (tmp_path / "step_2.partial").mkdir()
    write(tmp_path / "step_1")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    discard(tmp_path / "step_1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_replacement_that_is_interrupted_loses_neither(tmp_path, monkeypatch, stopped_after):
    """Stopped while neither has the name, or while both are there: the next start finds the new one, whole."""
    write(tmp_path / "step_1", content=b"old")
    rename, calls = os.rename, []

    def stop_after(*args):
        rename(*args)
        calls.append(args)
        if len(calls) == stopped_after:
            raise SystemError  # stands for the end of the process: no clean-up runs

    monkeypatch.setattr(os, "rename", stop_after)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(SystemError):
        write(tmp_path / "step_1", content=b"new")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    verify(tmp_path / "step_1")
    assert (tmp_path / "step_1" / "weights").read_bytes() == b"new"


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save .*step_1, which needs 10,000,000,000,000,000 bytes: only"):
        write(tmp_path / "step_1", num_bytes=10**16)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_earlier_checkpoints(small_disk):
    write(small_disk / "step_1")
    with pytest.raises(CheckpointError, match="step_2, which needs 10 bytes: .*No space left on device"):
        write(small_disk / "step_2", content=b"x" * 3_000_000)
    verify(small_disk / "step_1")
    assert [p.name for p in small_disk.iterdir()] == ["step_1"]


def test_a_disk_that_turns_read_only_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save .*Not a directory"):
        write(tmp_path / "file" / "step_1")
