import json
import os

import pytest

from owlore_tune.checkpoints.steps import SEAL, StepCheckpoints, remove_leftovers, sealed_directory, verify
from owlore_tune.errors import CheckpointError

RUN = "0123abcd"


def write(directory, num_bytes=10, content=b"x" * 1000, run_id=RUN):
    with sealed_directory(directory, num_bytes, run_id) as partial:
        (partial / "weights").write_bytes(content)
        (partial / "config").write_text("{}")
        assert not directory.exists() or (directory / SEAL).exists()


def test_a_directory_appears_whole(tmp_path):
    write(tmp_path / "step_1")
    seal = verify(tmp_path / "step_1")
    assert seal["run_id"] == RUN
    assert sorted(p.name for p in (tmp_path / "step_1").iterdir()) == [SEAL, "config", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_files_and_folders_are_on_disk_before_the_name_is_and_the_name_before_the_end(tmp_path, monkeypatch):
    """So also a machine that loses power has either all of a directory or nothing of that name."""
    calls = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor):
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(source, target):
        assert {path.stat().st_ino for path in [source, *source.rglob("*")]} <= set(calls)
        calls.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    with sealed_directory(tmp_path / "step_1", 10, RUN) as partial:
        (partial / "optimizer").mkdir()
        (partial / "optimizer" / "rank_0").write_text("state")
        (partial / "config").write_text("{}")
    assert calls == [tmp_path.stat().st_ino]


def test_nothing_that_exists_is_replaced(tmp_path):
    write(tmp_path / "step_1")
    (tmp_path / "step_2").mkdir()
    (tmp_path / "step_3").symlink_to(tmp_path / "nowhere")
    for name in ("step_1", "step_2", "step_3"):
        with pytest.raises(CheckpointError, match=f"cannot save .*{name}.*: it exists already"):
            write(tmp_path / name, content=b"y")
    assert (tmp_path / "step_1" / "weights").read_bytes() == b"x" * 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2", "step_3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), sealed_directory(tmp_path / "step_1", 10, RUN) as partial:
        (partial / "weights").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


DAMAGES = {
    "truncated": (lambda d: os.truncate(d / "weights", 400), "weights has 400 bytes, not 1,000"),
    "a flipped byte": (lambda d: (d / "weights").write_bytes(b"x" * 999 + b"y"), "weights is damaged"),
    "missing": (lambda d: (d / "weights").unlink(), "weights is missing"),
    "no seal": (lambda d: (d / SEAL).unlink(), f"{SEAL} cannot be read"),
    "half a seal": (lambda d: (d / SEAL).write_text('{"format"'), f"{SEAL} cannot be read"),
    "a file more": (lambda d: (d / "evil.py").write_text(""), f"evil.py is not in {SEAL}"),
    "an empty seal": (lambda d: reseal(d, lambda files: files.clear()), f"{SEAL} names no files"),
    "a path outside": (lambda d: reseal(d, lambda files: files.update({"../x": files["weights"]})), "/../x is missing"),
    "a link": (lambda d: (d / "more").symlink_to(d.parent), f"more is not in {SEAL}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path, damage):
    spoil, message = DAMAGES[damage]
    write(tmp_path / "step_1")
    spoil(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "step_1")


def reseal(directory, change):
    seal = json.loads((directory / SEAL).read_text())
    change(seal["files"])
    (directory / SEAL).write_text(json.dumps(seal))


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
            # A seal that passes still has the same content for every file.
            assert json.loads(seal.read_text())["files"] == json.loads(content)["files"]


def test_only_what_the_run_made_is_removed(tmp_path):
    (tmp_path / f"step_2.{RUN}.12345678.partial").mkdir()
    (tmp_path / f"step_3.{RUN}.12345678.discarded").mkdir()
    others = ["mine.partial", "step_4.feedbeef.12345678.partial", "step_5"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f"step_6.{RUN}.1.partial").symlink_to(tmp_path / "mine.partial")
    write(tmp_path / "step_1")
    write(tmp_path / "step_7", run_id="feedbeef")
    remove_leftovers(tmp_path, RUN)
    left = sorted([*others, f"step_6.{RUN}.1.partial", "step_1", "step_7"])
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    write(tmp_path / "step_8")
    StepCheckpoints(tmp_path, RUN).keep_last(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*left, "step_8"} - {"step_1"})


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save .*step_1, which needs 10,000,000,000,000,000 bytes: only"):
        write(tmp_path / "step_1", num_bytes=10**16)
    assert list(tmp_path.iterdir()) == []
