"""On a GPU, layers are read and written in the background. Here a CPU does it, with the same results."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from owlore_tune.errors import RunError
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
def expected(monkeypatch, config):
    """The weights of an unbroken run that waits for its store. From then on, the store is that of a GPU."""
    found = unbroken_weights(config)
    monkeypatch.setattr(run_weights, "LayerStore", BackgroundStore)
    return found


def test_weights_are_those_of_a_store_that_waits_and_nothing_waits_to_read(config, expected, monkeypatch):
    """The thread that trains reads no layer, and writes none, until the last checkpoint. A write that fails is tried
    again."""
    recipe, used = prepare(config | {"save_every_n_steps": None}), []
    for name in ("_read", "_write"):
        original = getattr(LayerStore, name)

        def note(store, *args, name=name, original=original):
            used.append((name, threading.current_thread() is threading.main_thread()))
            if name == "_write":
                time.sleep(0.2)  # so that files are not complete when they are needed
                if used.count(("_write", False)) == 1:
                    raise OSError("the disk is busy")
            return original(store, *args)

        monkeypatch.setattr(LayerStore, name, note)
    recipe.train()
    recipe.cleanup()
    assert_weights(config, expected)
    assert used.count(("_write", False)) > 1 and used.count(("_write", True)) <= 1
    assert used.count(("_read", False)) > 2
    assert used.count(("_read", True)) <= len(recipe.layers.active)  # for the last checkpoint


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(config, expected, monkeypatch):
    finetune_until(config, 5)  # with a checkpoint of step 4
    again = config | {"resume_from_checkpoint": True}
    recipe = prepare(again)

    def fail(store, file, weights):
        raise OSError("no space left on device")

    with monkeypatch.context() as full, pytest.raises(RunError, match="no space left on device"):
        full.setattr(LayerStore, "_write", fail)
        recipe.train()
    recipe.cleanup()
    finetune(again)
    assert_weights(config, expected)


@pytest.mark.parametrize("config", ["int8"], indirect=True)  # which reads nothing again before it ends
def test_a_process_that_ends_before_a_write_resumes_exactly(config, expected, monkeypatch):
    """Layers that leave the draw at step 6 are never written. The process ends at step 7."""
    finetune_until(config, 5)  # with a checkpoint of step 4
    again = config | {"resume_from_checkpoint": True}
    submit = ThreadPoolExecutor.submit

    def lose_writes(pool, work, *args):
        return Future() if "write" in work.__name__ else submit(pool, work, *args)

    with monkeypatch.context() as lost:
        lost.setattr(ThreadPoolExecutor, "submit", lose_writes)
        lost.setattr(BackgroundStore, "finish", lambda store, indices=None: None)
        finetune_until(again | {"save_every_n_steps": None}, 7)
    finetune(again)
    assert_weights(config, expected)


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


def test_only_the_layers_that_are_wanted_now_are_kept_in_memory(tmp_path):
    layout = SimpleNamespace(
        checkpoint_dir=tmp_path,
        to_tune=lambda name, tensor: {name: tensor},
        write_tensors=lambda weights, file: torch.save(weights, file),
    )
    store = BackgroundStore(layout, (), tmp_path, torch.float32)
    store.read_ahead([0, 1, 2])
    store.read_ahead([1])
    assert list(store._ahead) == [1]
    file = store.write(1, {"layers.1.w": torch.ones(2)})
    store.use(1, file)
    assert not store._ahead
    store.finish()
    assert not store._writes and file.is_file()
