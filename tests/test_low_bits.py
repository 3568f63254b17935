"""Optimizer state in 8 and 16 bits: size, accuracy against 32 bits, saving, offloading and refreshes."""

import pytest
import torch

from owlore_tune.optim import low_bits
from owlore_tune.optim.adamw import OwLoreAdamW

SHAPES = [(512, 256), (192, 384)]


def spectrum_grads(num_steps: int, decay: float, shapes=SHAPES):
    """Gradients with fixed singular vectors and singular values 1 / rank^decay."""
    gen = torch.Generator().manual_seed(3)
    bases = [torch.linalg.qr(torch.randn(n, n, generator=gen)).Q for _, n in shapes]
    for _ in range(num_steps):
        yield [
            torch.randn(m, n, generator=gen) * torch.arange(1, n + 1.0) ** -decay @ basis.T
            for (m, n), basis in zip(shapes, bases, strict=True)
        ]


def trained(steps, shapes=SHAPES, **options):
    """Train parameters from zero on ``steps``. Returns the parameters and the optimizer."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = OwLoreAdamW(parameters, lr=1e-2, **options)
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("bits,tolerance", [(32, 0), (16, 2**-8), (8, 0.02)])
def test_what_is_stored_comes_back_within_its_rounding(bits, tolerance, by_column):
    value = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    restored = low_bits.restore(low_bits.store(value, bits, by_column=by_column), torch.float32, by_column=by_column)
    assert restored.shape == value.shape and restored.is_contiguous()
    assert (restored - value).abs().max() <= tolerance * value.abs().max()


def test_a_block_of_8_bits_lies_in_a_column():
    value = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * 10.0 ** -(torch.arange(32) / 4)
    by_column = low_bits.restore(low_bits.store(value, 8, by_column=True), torch.float32, by_column=True)
    errors = (by_column - value).abs().amax(0) / value.abs().amax(0)
    assert errors.max() < 0.02
    by_row = low_bits.restore(low_bits.store(value, 8), torch.float32)
    assert not by_row[:, 28:].any()  # rounded to zero


def test_small_or_odd_state_stays_in_32_bits():
    for shape in ((15, 256), (4097,)):
        assert low_bits.zeros(shape, 8, dtype=torch.float32, device="cpu").dtype == torch.float32


def test_a_piece_writes_through():
    stored = low_bits.zeros((64, 128), 8, dtype=torch.float32, device="cpu")
    low_bits.update(low_bits.piece(stored, 1024, 2048), torch.ones(1024))
    assert low_bits.restore(stored, torch.float32).view(-1).nonzero().flatten().tolist() == list(range(1024, 2048))


def test_bytes_of_8_bit_moments_and_bf16_bases():
    """SmolLM2's layer shapes at rank 128: a quarter for moments, half for bases, plus scales and maps."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (576, 1536), (1536, 576)]
    steps = list(spectrum_grads(1, 1.0, shapes))
    _, full = trained(steps, shapes, rank=128)
    _, small = trained(steps, shapes, rank=128, state_bits=8, basis_bits=16)
    assert small.state_bytes() <= 0.35 * full.state_bytes()
    planned = [full.meta_state(parameter) for parameter in full.param_groups[0]["params"]]
    assert full.state_bytes() == sum(low_bits.num_bytes(value) for state in planned for value in state.values())
    planned = [small.meta_state(parameter) for parameter in small.param_groups[0]["params"]]
    assert small.state_bytes() == sum(low_bits.num_bytes(value) for state in planned for value in state.values())


@pytest.mark.parametrize("rank,decay", [(32, 1.0), (32, 2.0), (None, 0.0)])
def test_8_bits_train_nearly_as_32_do(rank, decay):
    steps = list(spectrum_grads(30, decay))
    full, _ = trained(steps, rank=rank)
    small, _ = trained(steps, rank=rank, state_bits=8)
    for a, b in zip(small, full, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


def test_a_bf16_basis_trains_nearly_as_a_float32_one():
    steps = list(spectrum_grads(30, 1.0))
    full, _ = trained(steps, rank=32)
    small, _ = trained(steps, rank=32, basis_bits=16)
    for a, b in zip(small, full, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
def test_a_reloaded_8_bit_run_goes_on_with_the_same_bits(tmp_path, moments):
    options = dict(rank=32, update_gap=4, moments=moments, state_bits=8, basis_bits=8)
    steps = list(spectrum_grads(10, 1.0))
    expected, _ = trained(steps, **options)
    half, optimizer = trained(steps[:6], **options)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in half]
    resumed = OwLoreAdamW(parameters, lr=1e-2, **options)
    resumed.load_state_dict(saved)
    del saved
    (tmp_path / "state.pt").unlink()
    for grads in steps[6:]:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        resumed.step()
    for a, b in zip(parameters, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_goes_to_pinned_memory_and_back():
    parameter = torch.nn.Parameter(torch.zeros(512, 256, device="cuda"))
    optimizer = OwLoreAdamW([parameter], rank=32, state_bits=8)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = {
        key: low_bits.copy_to(value) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)
    }
    optimizer.deactivate([parameter], "offload")
    optimizer.state_dict()  # waits for pending copies
    assert all(value.device.type == "cpu" for value in optimizer.state[parameter].values() if torch.is_tensor(value))
    assert optimizer.state[parameter]["basis"].is_pinned()
    optimizer.activate([parameter])
    for key, value in before.items():
        now = low_bits.restore(optimizer.state[parameter][key], torch.float32)
        assert torch.equal(now, low_bits.restore(value, torch.float32))


@pytest.mark.parametrize("options", [dict(state_bits=4), dict(basis_bits=24), dict(state_bits=16)])
def test_other_numbers_of_bits_are_refused(options):
    (key, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{key}={value}; choose one of 32"):
        OwLoreAdamW([torch.nn.Parameter(torch.zeros(64, 64))], rank=8, **options)
