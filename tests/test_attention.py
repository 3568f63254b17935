"""Attention over packed rows."""

import copy

import pytest
import torch
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.models.llama3_2 import llama3_2

from owlore_tune.data.samples import collate_packed
from owlore_tune.models.attention import skip_future_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipping_future_keys_changes_no_bit(dtype):
    """Outputs and gradients, with samples of many lengths and rows longer than the kernel's blocks."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96}
    model = llama3_2(vocab_size=100, max_seq_len=1200, **sizes).to(dtype)
    ours = copy.deepcopy(model)
    skip_future_keys(ours)
    lengths = ([1, 30, 700, 400, 69], [1200])
    rows = [
        {
            "tokens": torch.randint(100, (1200,)),
            "labels": torch.zeros(1200, dtype=torch.long),
            "input_pos": torch.cat([torch.arange(length) for length in row]),
            "seq_lens": torch.tensor(row),
        }
        for row in lengths
    ]
    batch = collate_packed(rows)
    del batch["labels"]
    outputs = model(**batch), ours(**batch)
    assert torch.equal(*outputs)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    for one, other in zip(model.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_the_mask_of_packed_rows_does_not_depend_on_the_machine(monkeypatch):
    """It equals torchtune's on a machine without a GPU, and is a tensor on one with a GPU."""
    samples = [{"tokens": list(range(n)), "labels": list(range(n))} for n in (3, 5, 2, 6)]
    rows = list(PackedDataset(samples, max_seq_len=10))
    monkeypatch.setattr("torchtune.modules.attention_utils._SUPPORTS_FLEX_ATTENTION", False)
    expected = padded_collate_packed(rows)
    monkeypatch.setattr("torchtune.modules.attention_utils._SUPPORTS_FLEX_ATTENTION", True)
    batch = collate_packed(rows)
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_rows_without_a_mask():
    model = llama3_2(100, 1, 2, 2, 32, 64)
    ours = copy.deepcopy(model)
    skip_future_keys(ours)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), ours(tokens))
