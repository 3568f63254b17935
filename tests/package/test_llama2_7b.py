"""The LLaMA-2-7B config from checkpoint to checkpoint, with a small model of the same layout."""

import json
from pathlib import Path

import torch
from forks import run_command

from owlore_tune.config.load import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = [
    "model._component_=torchtune.models.llama2.llama2", "model.vocab_size=2000", "model.num_layers=3",
    "model.num_heads=4", "model.num_kv_heads=4", "model.embed_dim=64", "model.intermediate_dim=96",
    "model.max_seq_len=128",
]  # fmt: skip


def test_random_weights_train_by_the_7b_config_and_load_in_transformers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from lib.random_weights import write_random
    from transformers import AutoModelForCausalLM

    weights, output = tmp_path / "weights", tmp_path / "run"
    write_random(load_config("llama2/7B_owlore", SMALL), weights)
    index = json.loads((weights / "model.safetensors.index.json").read_text())
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= index["weight_map"].keys()
    run_command(
        "tune", "run", "owlore_full_finetune", "--config", "llama2/7B_owlore", f"output_dir={output}", *SMALL,
        f"checkpointer.checkpoint_dir={weights}", "dataset=owlore_tune.data.mmlu_dev_dataset",
        "~dataset.source", "~dataset.data_files",
        "dataset.packed=true", "tokenizer.max_seq_len=128", "gradient_accumulation_steps=2", "max_steps_per_epoch=3",
        "owlore.num_active_layers=2", "owlore.resample_every=2", "owlore.rank=16", "lr_scheduler=null",
        "device=cpu",
    )  # fmt: skip
    manifest = json.loads((output / "manifest.json").read_text())

    before = AutoModelForCausalLM.from_pretrained(weights)
    after = AutoModelForCausalLM.from_pretrained(output / "step_3")
    assert after.dtype == torch.bfloat16
    changed = {
        int(name.split(".")[2])
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b) and ".layers." in name
    }
    assert changed == {layer for draw in manifest["draws"] for layer in draw["active"]}
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
