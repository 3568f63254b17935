"""Attention over packed rows."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from owlore_tune.data.loader import batch_to_device, collate_packed
from owlore_tune.models.attention import attend_by_sample


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_by_sample_equals_attention_with_a_mask(dtype, checkpointing):
    """Outputs and gradients, with samples of many lengths."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96}
    model = llama3_2(vocab_size=100, max_seq_len=300, **sizes).to(dtype)
    ours = copy.deepcopy(model)
    attend_by_sample(ours)
    if checkpointing:
        set_activation_checkpointing(ours, auto_wrap_policy={TransformerSelfAttentionLayer})
    rows = [
        {
            "tokens": torch.randint(100, (300,)),
            "labels": torch.zeros(300, dtype=torch.long),
            "input_pos": torch.cat([torch.arange(length) for length in lengths]),
            "seq_lens": torch.tensor(lengths),
        }
        for lengths in ([1, 30, 1, 1, 200, 67], [300])
    ]
    batch = batch_to_device(collate_packed(rows), torch.device("cpu"))
    del batch["labels"]
    outputs = model(**batch), ours(**batch)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    tolerance = 1e-9 if dtype == torch.float64 else 0.02
    gradients = [[parameter.grad for parameter in one.parameters()] for one in (model, ours)]
    for expected, got in zip([outputs[0], *gradients[0]], [outputs[1], *gradients[1]], strict=True):
        difference = torch.linalg.vector_norm((got - expected).double())
        assert difference < tolerance * torch.linalg.vector_norm(expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_attention_on_a_cpu_has_few_lengths(dtype, monkeypatch):
    """torch keeps memory for every length, and a run with many would exceed its plan."""
    model, seen = llama3_2(100, 1, 2, 2, 32, 128).to(dtype), []
    attend_by_sample(model)

    def watched(q, *args, **kwargs):
        seen.append(q.shape[2])
        return scaled_dot_product_attention(q, *args, **kwargs)

    monkeypatch.setattr("owlore_tune.models.attention.scaled_dot_product_attention", watched)
    lengths = [1, 31, 32, 40]
    for parts in (lengths, [50]):
        tokens = torch.arange(sum(parts))[None] % 100
        same = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        mask = (same[:, None] == same).tril()[None] if len(parts) > 1 else None
        assert model(tokens, mask=mask).shape == (1, sum(parts), 100)
    assert seen == ([*lengths, 50] if dtype == torch.float32 else [32, 32, 32, 64, 64])


def test_the_mask_of_packed_rows_does_not_depend_on_the_machine(monkeypatch):
    """It equals torchtune's on a machine without a GPU, and is a tensor on one with a GPU. The first token of a sample
    has no label."""
    samples = [{"tokens": list(range(n)), "labels": list(range(n))} for n in (3, 5, 2, 6)]
    rows = list(PackedDataset(samples, max_seq_len=10))
    monkeypatch.setattr("torchtune.modules.attention_utils._SUPPORTS_FLEX_ATTENTION", False)
    expected = padded_collate_packed(rows)
    batch = batch_to_device(collate_packed(rows), torch.device("cpu"))
    assert batch.keys() == expected.keys()
    is_first = (expected["input_pos"] == 0) & (torch.arange(10) > 0)
    assert is_first.sum() == 2
    expected["labels"][is_first] = -100
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_rows_without_a_mask():
    model = llama3_2(100, 1, 2, 2, 32, 64)
    ours = copy.deepcopy(model)
    attend_by_sample(ours)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), ours(tokens))
