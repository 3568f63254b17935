"""On a GPU, layers are read and written in the background. Here a CPU does it, with the same results."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from owlore_tune.errors import RunError
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.quantized.store import BackgroundStore, LayerStore
from owlore_tune.training import load_weights as run_weights
from runs import after_step, assert_weights, finetune, finetune_until, prepare, unbroken_weights, variant

FORMATS = {
    "int8": {"owlore__weights": "int8", "owlore__products": "int8", "owlore__update_gap": 100},
    "nf4": {"owlore__weights": "nf4", "owlore__update_gap": 2},
    "all layers": {"owlore__weights": "nf4", "owlore__update_gap": 2, "owlore__num_active_layers": None},
}


@pytest.fixture(params=FORMATS)
def config(request, tiny_config):
    return variant(tiny_config, "run", dataset_val=None, save_every_n_steps=4, **FORMATS[request.param])


@pytest.fixture
def in_background(monkeypatch, config):
    """The config; its store is that of a GPU once the run without one has been made."""
    unbroken_weights(config)
    monkeypatch.setattr(run_weights, "LayerStore", BackgroundStore)
    return config


def test_weights_are_those_of_a_store_that_waits_and_nothing_waits_to_read(in_background, monkeypatch):
    """The thread that trains reads no layer, and writes none, until the last checkpoint."""
    expected = unbroken_weights(in_background)
    recipe = prepare(in_background | {"save_every_n_steps": None})
    used = []
    for name in ("_read", "_write"):
        original = getattr(LayerStore, name)

        def note(store, *args, name=name, original=original):
            used.append((name, threading.current_thread() is threading.main_thread()))
            if name == "_write":
                time.sleep(0.2)  # so that files are not complete when they are needed
            return original(store, *args)

        monkeypatch.setattr(LayerStore, name, note)
    recipe.train()
    recipe.cleanup()
    assert_weights(in_background, expected)
    assert ("_write", False) in used and ("_write", True) not in used
    assert used.count(("_read", False)) > 2
    assert used.count(("_read", True)) <= len(recipe.layers.active)  # for the last checkpoint


def test_a_write_that_fails_is_tried_again(in_background, monkeypatch):
    expected, original, failed = unbroken_weights(in_background), LayerStore._write, []

    def fail_first(store, file, weights):
        if not failed and threading.current_thread() is not threading.main_thread():
            failed.append(file)
            raise OSError("the disk is busy")
        original(store, file, weights)

    recipe = prepare(in_background)
    monkeypatch.setattr(LayerStore, "_write", fail_first)
    recipe.train()
    recipe.cleanup()
    assert failed
    assert_weights(in_background, expected)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(in_background, monkeypatch):
    expected = unbroken_weights(in_background)
    finetune_until(in_background, 5)  # with a checkpoint of step 4
    recipe = prepare(in_background | {"resume_from_checkpoint": True})

    def fail(store, file, weights):
        raise OSError("no space left on device")

    with monkeypatch.context() as full, pytest.raises(RunError, match="no space left on device"):
        full.setattr(LayerStore, "_write", fail)
        recipe.train()
    recipe.cleanup()
    finetune(in_background | {"resume_from_checkpoint": True})
    assert_weights(in_background, expected)


@pytest.mark.parametrize("config", ["int8"], indirect=True)  # which reads nothing again before it ends
def test_a_process_that_ends_before_a_write_resumes_exactly(in_background, monkeypatch):
    """Layers that leave the draw at step 6 are never written. The process ends at step 7."""
    expected = unbroken_weights(in_background)
    finetune_until(in_background, 5)  # with a checkpoint of step 4
    with monkeypatch.context() as lost:
        write = BackgroundStore.write

        def never(store, index, weights):
            threads, store._threads = store._threads, Lost()
            file = write(store, index, weights)
            store._threads = threads
            return file

        lost.setattr(BackgroundStore, "write", never)
        lost.setattr(BackgroundStore, "finish", lambda store, indices=None: None)
        finetune_until(in_background | {"resume_from_checkpoint": True, "save_every_n_steps": None}, 7)
    finetune(in_background | {"resume_from_checkpoint": True})
    assert_weights(in_background, expected)


class Lost:
    """Threads that never do what they are given."""

    def submit(self, *args):
        return Future()


def test_bases_of_all_layers_end_in_different_steps(tiny_config):
    """So that few layers are quantized in one step."""
    changes = {"dataset_val": None, "owlore__num_active_layers": None, "owlore__score": "uniform"}
    changes |= {"owlore__weights": "nf4", "owlore__update_gap": 4, "owlore__resample_every": 100}
    recipe, ages = prepare(variant(tiny_config, "all", **changes)), []
    for step in range(1, 9):
        after_step(recipe, step, lambda: ages.append([layer.age for layer in recipe.layers.layers]))
    recipe.train()
    recipe.cleanup()
    assert all(len(set(of_step)) == 4 for of_step in ages)


def test_a_sampler_tells_its_next_draw():
    sampler = LayerSampler([1.0, 2.0, 3.0, 4.0], 2, seed=1)
    for _ in range(20):
        expected = sampler.peek()
        assert sampler.peek() == expected == sampler.draw()


def test_only_the_layers_that_are_wanted_now_are_kept_in_memory(tmp_path):
    class Layout:
        checkpoint_dir = tmp_path

        def to_tune(self, name, tensor):
            return {name: tensor}

        def write_tensors(self, weights, file):
            torch.save(weights, file)

    store = BackgroundStore(Layout(), (), tmp_path, torch.float32)
    store.read_ahead([0, 1, 2])
    store.read_ahead([1])
    assert list(store._ahead) == [1]
    file = store.write(1, {"layers.1.w": torch.ones(2)})
    store.use(1, file)
    assert not store._ahead
    store.finish()
    assert not store._writes and file.is_file()
