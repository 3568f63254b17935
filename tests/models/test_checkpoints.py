"""Model directories: what is read, what is written, and what is copied beside the weights."""

import json
import shutil

import pytest
import torch
from families import BUILDER, FAMILIES, hf_model
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune import config as tune_config
from transformers import AutoModelForCausalLM

from owlore_tune import files as digests
from owlore_tune.checkpoints.hf_weights import HFCheckpointer, leads_outside
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.smollm2 import smollm2_135m
from runs import save


def build(family="llama2"):
    _, builder, differences, _ = FAMILIES[family]
    with torch.device("meta"):
        return tune_config.instantiate(OmegaConf.create({"_component_": builder} | BUILDER | differences))


def load(directory, model_type="LLAMA2", model=None, dtype=torch.float32):
    model = model or build()
    checkpointer = HFCheckpointer(str(directory), model_type)
    checkpointer.load_checkpoint(model, dtype=dtype, device=torch.device("cpu"))
    return model, checkpointer


@pytest.fixture
def source(tmp_path):
    return hf_model(FAMILIES["llama2"][-1], tmp_path / "source")


@pytest.fixture
def ids():
    return torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shard_bytes", [2 * 10**9, 10_000])
def test_weights_in_one_file_or_several_are_read_by_transformers_and_again(shard_bytes, source, tmp_path, ids):
    model, checkpointer = load(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save(checkpointer, model, tmp_path / "out", shard_bytes=shard_bytes)
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert num_files == 1 if shard_bytes > 10**6 else num_files > 3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(ids).logits, model(ids), atol=2e-4, rtol=0)
    again, _ = load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_real_smollm2_gives_transformers_logits(smollm2_dir, ids):
    with torch.device("meta"):
        model = smollm2_135m()
    load(smollm2_dir, "LLAMA3_2", model)
    hf = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(tmp_path):
    """torchtune's conversion for Qwen 2 would drop it."""
    directory = hf_model(FAMILIES["qwen2_5 tied"][-1], tmp_path / "hf")
    stored = load_file(directory / "model.safetensors")
    for factor in (1.0, 2.0):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * factor
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        if factor == 1.0:
            load(directory, "QWEN2", build("qwen2_5 tied"))
    with pytest.raises(ValueError, match="has an output head that differs from the embeddings"):
        load(directory, "QWEN2", build("qwen2_5 tied"))


def test_a_parameter_that_someone_holds_is_filled_in_place(source):
    model = build()
    held = dict(model.named_parameters())
    load(source, model=model)
    assert all(p is held[name] and not p.is_meta for name, p in model.named_parameters())


def test_dtype_of_the_run_is_in_the_exported_config(source, tmp_path):
    model, checkpointer = load(source, dtype=torch.bfloat16)
    save(checkpointer, model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_bin_files_are_read_where_there_are_no_safetensors(source, ids):
    expected, _ = load(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    model, _ = load(source)
    assert torch.equal(model(ids), expected(ids))


def test_fingerprint_reads_every_byte_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(source, tmp_path / "same")
    read, checksum = [], digests.checksum
    monkeypatch.setattr(digests, "checksum", lambda file: read.append(file) or checksum(file))
    first, again, same = (
        HFCheckpointer(str(directory), "LLAMA2").fingerprint() for directory in (source, source, tmp_path / "same")
    )
    assert first == again == same and len(read) == 2
    file = tmp_path / "same" / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in (-1, -100, -5000):  # one byte of a weight, at any position
        content[place] ^= 1
        file.write_bytes(content)
        assert HFCheckpointer(str(tmp_path / "same"), "LLAMA2").fingerprint() != first
        content[place] ^= 1


def test_only_known_companions_of_the_directory_itself_are_copied(source, tmp_path):
    for name in ("tokenizer.json", "secrets.env", "modeling_evil.py"):
        (source / name).write_text("{}")
    (tmp_path / "outside").write_text("private")
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").symlink_to(tmp_path / "outside")
    (source / "vocab.json").symlink_to(source / "tokenizer.json")
    model, checkpointer = load(source)
    save(checkpointer, model, tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found - {"generation_config.json"} == {
        "config.json", "model.safetensors", "tokenizer.json", "vocab.json"
    }  # fmt: skip


def test_links_into_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "merges.txt").symlink_to("/etc/hostname")
    assert not leads_outside(snapshot / "tokenizer.json")
    assert leads_outside(snapshot / "merges.txt")


def test_checkpoints_of_a_run_in_the_format_of_torchtune_have_no_chat_template(tiny_dir, tmp_path):
    checkpointer = HFCheckpointer(str(tiny_dir), "LLAMA2")
    checkpointer.take_tokenizer(tiny_dir / "tokenizer.json")  # as with a tokenizer of torchtune
    checkpointer.copy_companions(tmp_path, torch.float32)
    assert HFChatTokenizer(str(tiny_dir)).is_chat and not HFChatTokenizer(str(tmp_path)).is_chat
    assert HFChatTokenizer(str(tmp_path)).eos_id == HFChatTokenizer(str(tiny_dir)).eos_id
