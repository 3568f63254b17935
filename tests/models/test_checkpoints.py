import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchtune.models.llama2 import llama2
from torchtune.models.qwen2 import qwen2
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.smollm2 import smollm2_135m
from runs import save

HF = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, dtype="float32",
)  # fmt: skip
TUNE = dict(vocab_size=96, num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=48, max_seq_len=64)
FAMILIES = {
    "LLAMA2": (LlamaForCausalLM, LlamaConfig(**HF), lambda: llama2(**TUNE)),
    "QWEN2": (
        Qwen2ForCausalLM,
        Qwen2Config(**HF, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        lambda: qwen2(**TUNE, norm_eps=1e-5, rope_base=1_000_000, tie_word_embeddings=True),
    ),
}


def load(directory, model_type, build, dtype=torch.float32):
    with torch.device("meta"):
        model = build()
    checkpointer = HFCheckpointer(str(directory), model_type)
    checkpointer.load_checkpoint(model, dtype=dtype, device=torch.device("cpu"))
    return model, checkpointer


def hf_directory(family, directory):
    model_class, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config).save_pretrained(directory)
    return directory


@pytest.fixture
def ids():
    return torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shard_bytes", [2 * 10**9, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_in_and_come_out_with_equal_logits(family, shard_bytes, tmp_path, ids):
    source = hf_directory(family, tmp_path / "source")
    model, checkpointer = load(source, family, FAMILIES[family][2])
    expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save(checkpointer, model, tmp_path / "out", shard_bytes=shard_bytes)
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert num_files == 1 if shard_bytes > 10**6 else num_files > 3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(ids).logits, model(ids), atol=1e-4, rtol=0)
    again, _ = load(tmp_path / "out", family, FAMILIES[family][2])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_real_smollm2_gives_transformers_logits(smollm2_dir, ids):
    model, _ = load(smollm2_dir, "LLAMA3_2", smollm2_135m)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    hf = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(tmp_path):
    """torchtune's conversion for Qwen 2 would drop it."""
    _, _, build = FAMILIES["QWEN2"]
    directory = hf_directory("QWEN2", tmp_path / "hf")
    stored = load_file(directory / "model.safetensors")
    for factor in (1.0, 2.0):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * factor
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        if factor == 1.0:
            load(directory, "QWEN2", build)
    with pytest.raises(ValueError, match="has an output head that differs from the embeddings"):
        load(directory, "QWEN2", build)


def test_a_parameter_that_someone_holds_is_filled_in_place(tmp_path):
    source = hf_directory("LLAMA2", tmp_path / "source")
    with torch.device("meta"):
        model = llama2(**TUNE)
    held = dict(model.named_parameters())
    HFCheckpointer(str(source), "LLAMA2").load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    assert all(p is held[name] and not p.is_meta for name, p in model.named_parameters())


def test_dtype_of_the_run_is_in_the_exported_config(tmp_path):
    source = hf_directory("LLAMA2", tmp_path / "source")
    model, checkpointer = load(source, "LLAMA2", FAMILIES["LLAMA2"][2], torch.bfloat16)
    save(checkpointer, model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_bin_files_are_read_where_there_are_no_safetensors(tmp_path, ids):
    source = hf_directory("LLAMA2", tmp_path / "source")
    expected, _ = load(source, "LLAMA2", FAMILIES["LLAMA2"][2])
    with safe_open(source / "model.safetensors", framework="pt") as file:
        torch.save({name: file.get_tensor(name) for name in file.keys()}, source / "pytorch_model.bin")  # noqa: SIM118
    (source / "model.safetensors").unlink()
    model, _ = load(source, "LLAMA2", FAMILIES["LLAMA2"][2])
    assert torch.equal(model(ids), expected(ids))


def test_fingerprint_reads_every_byte_once(tmp_path, monkeypatch):
    from owlore_tune import files as digests

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = hf_directory("LLAMA2", tmp_path / "source")
    shutil.copytree(source, tmp_path / "same")
    read = []
    checksum = digests.checksum
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


def test_only_known_companions_of_the_directory_itself_are_copied(tmp_path):
    source = hf_directory("LLAMA2", tmp_path / "source")
    for name in ("tokenizer.json", "secrets.env", "modeling_evil.py"):
        (source / name).write_text("{}")
    (tmp_path / "outside").write_text("private")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "outside")
    (source / "vocab.json").symlink_to(source / "tokenizer.json")
    model, checkpointer = load(source, "LLAMA2", FAMILIES["LLAMA2"][2])
    save(checkpointer, model, tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found - {"generation_config.json"} == {
        "config.json", "model.safetensors", "tokenizer.json", "vocab.json"
    }  # fmt: skip


def test_links_into_a_hub_cache_are_followed(tmp_path):
    from owlore_tune.checkpoints.hf_weights import leads_outside

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
