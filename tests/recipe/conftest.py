import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import TINY_MODEL

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.config.load import find_config, load_config


@pytest.fixture
def place(tmp_path, tiny_dir, tiny_data, harness_index, monkeypatch) -> Path:
    """A user directory with a config for each recipe, a model without weights, and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HFCheckpointer, "load_checkpoint", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    shutil.copytree(tiny_dir, "model")
    shutil.copy(tiny_data, "train.json")
    config = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
    data = {"_component_": "owlore_tune.data.instruction_dataset", "data_files": "train.json"}
    config |= {
        "output_dir": "run", "model": dict(TINY_MODEL), "dataset": data, "dataset_val": None,
        "checkpointer": config["checkpointer"] | {"checkpoint_dir": "model", "model_type": "LLAMA2"},
        "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    config["owlore"] |= {"num_active_layers": 2}
    config["owlore"] |= {"rank": 8}
    OmegaConf.save(OmegaConf.create(config), "train.yaml")
    evaluation = OmegaConf.to_container(OmegaConf.load(find_config("eval/mmlu_dev")), resolve=False)
    evaluation |= {"output_dir": "evaluation", "model": dict(TINY_MODEL), "checkpointer": config["checkpointer"]}
    OmegaConf.save(OmegaConf.create(evaluation), "eval.yaml")
    return tmp_path
