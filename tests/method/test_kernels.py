"""Triton kernels against torch, on a GPU, or in Triton's interpreter on a CPU."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

pytest.importorskip("triton", reason="needs Triton")

from torchao.prototype.quantized_training import int8_mm

from owlore_tune.kernels import quantize as kernels
from owlore_tune.kernels.rotary import rotate
from owlore_tune.models import fused
from owlore_tune.quantized import formats
from owlore_tune.quantized.formats import Int8Weight, NF4Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 64), (5, 576), (1, 1), (7, 65), (2, 4097), (0, 64)]
TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


class Interpreted:
    """torchao's kernel without the search for block sizes, which needs a GPU."""

    def __getitem__(self, grid):
        return partial(self._run, grid)

    def _run(self, grid, *args, **constants):
        blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
        kernel = int8_mm._scaled_int8_mm_kernel.fn.fn
        kernel[grid(blocks)](*args, **blocks, **constants, EVEN_K=args[7] % 32 == 0)


@pytest.fixture
def with_kernels(monkeypatch):
    """Weights compute with kernels, also on a CPU."""
    monkeypatch.setattr(formats, "has_kernels", lambda device: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "_int8_kernel", Interpreted)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def quantized(x):
    """Rows in 8 bits, in float64."""
    scale = x.abs().amax(dim=1, keepdim=True).double().clamp_min(TINY) / 127
    return (x / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_factors", [False, True])
def test_rows_are_quantized_as_torch_does(shape, dtype, has_factors):
    x = normal(*shape, dtype=dtype)
    factors = normal(shape[1], seed=1) if has_factors else None
    codes, scale = kernels.quantize_rows(x, factors)
    expected, expected_scale = quantized(x.float() if factors is None else x.float() * factors)
    assert (codes.shape, codes.dtype, scale.shape, scale.dtype) == (shape, torch.int8, (shape[0], 1), torch.float32)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0)
    # A value between two codes goes to either, after rounding errors of float32.
    assert (codes.int() - expected.int()).abs().sum() <= 1e-3 * codes.numel()


def test_rows_with_a_stride_are_quantized():
    x = normal(4, 200)
    codes, scale = kernels.quantize_rows(x[:, 10:110], None)
    expected = kernels.quantize_rows(x[:, 10:110].clone(), None)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e30, 3e38])
def test_huge_and_tiny_rows_keep_their_codes(size):
    x = torch.linspace(-1, 1, 127, device=DEVICE)[None]
    codes, scale = kernels.quantize_rows(x * size, None)
    assert torch.equal(codes, kernels.quantize_rows(x, None)[0])
    assert codes[0, 0] == -127 and scale.item() == pytest.approx(size / 127, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_rows_of_zeros_stay_zero_and_those_that_are_not_finite_have_no_finite_scale(value):
    x = normal(3, 100)
    x[1, 37] = value
    x[2] = 0
    codes, scale = kernels.quantize_rows(x, None)
    assert scale.isfinite().flatten().tolist() == [True, value == 0, True]
    assert not codes[2].any() and scale[2] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (3, 4160)])
def test_nf4_is_dequantized_as_torch_does(with_kernels, monkeypatch, shape, dtype):
    weight = NF4Weight.quantize(normal(*shape) * torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None])
    found = weight.dequantize(dtype)
    monkeypatch.setattr(formats, "has_kernels", lambda device: False)
    # The interpreter rounds towards zero to 16 bits; a GPU rounds to the nearest value.
    tolerance = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, weight.dequantize(dtype), rtol=tolerance, atol=0)


def test_parts_of_nf4_are_dequantized(with_kernels):
    weight = NF4Weight.quantize(normal(10, 256))
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.dequantize(torch.float32, slice(2, 7)), whole[2:7])
    assert torch.equal(weight.dequantize(torch.float32, columns=slice(64, 192)), whole[:, 64:192])
    rows = torch.tensor([3, 3, 9], device=DEVICE)
    assert torch.equal(weight.dequantize(torch.float32, rows), whole[rows])
    assert NF4Weight.empty(torch.Size((0, 64)), DEVICE).dequantize(torch.float32).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(40, 64, 96), (1, 64, 32), (33, 70, 45), (3, 1, 5), (17, 576, 1), (0, 64, 8)])
def test_8_bit_products_are_those_of_the_quantized_values(with_kernels, sizes, dtype):
    t, n, m = sizes
    weight = Int8Weight.quantize(normal(m, n, seed=1))
    x = normal(t, n, dtype=dtype).requires_grad_()
    product = weight.linear(x, "int8")
    codes, scale = quantized(x.detach().float())
    expected = (codes.double() * scale) @ weight.dequantize(torch.float64).T
    assert product.dtype == dtype and is_near(product, expected, 2 * torch.finfo(dtype).eps + 1e-4)
    grad = normal(t, m, dtype=dtype, seed=2)
    product.backward(grad)
    codes, scale = quantized(grad.float() * weight.scale.view(-1))
    expected = (codes.double() * scale) @ weight.codes.double()
    assert x.grad.dtype == dtype and is_near(x.grad, expected, 2 * torch.finfo(dtype).eps + 1e-4)


def is_near(found, expected, size):
    assert found.shape == expected.shape
    return (found.double() - expected).norm() <= size * expected.norm()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compares with torch's products of a CPU")
def test_kernels_and_torch_agree(with_kernels, monkeypatch):
    weight, x = Int8Weight.quantize(normal(96, 128, seed=1)), normal(40, 128).requires_grad_()
    product = weight.linear(x, "int8")
    (grad,) = torch.autograd.grad(product.square().sum(), x)
    monkeypatch.setattr(formats, "has_kernels", lambda device: False)
    expected = weight.linear(x, "int8")
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
    assert is_near(grad, expected_grad.double(), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (1, 1, 1, 2), (2, 7, 4, 6)])
@pytest.mark.parametrize("kind", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
def test_rotary_embeddings_are_those_of_torchtune(shape, dtype, kind):
    rope = kind(dim=shape[-1], max_seq_len=32).to(DEVICE)
    x, grad = normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, dtype=dtype, seed=1)
    some = torch.randint(32, shape[:2], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # The interpreter rounds towards zero to 16 bits; a GPU rounds to the nearest value.
    size = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for positions in (None, some, some[:1]):
        expected = rope(x, input_pos=positions)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        found = rotate(x, rope.cache, positions)
        (found_grad,) = torch.autograd.grad(found, x, grad)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=size, atol=4 * size)
        torch.testing.assert_close(found_grad, expected_grad, rtol=size, atol=4 * size)


def test_rotary_embeddings_with_strides_and_without_rows():
    rope = RotaryPositionalEmbeddings(dim=8, max_seq_len=32).to(DEVICE)
    x = normal(2, 3, 5, 8).transpose(1, 2)  # (b, s, heads, width) as attention's gradients have it
    torch.testing.assert_close(rotate(x, rope.cache, None), rope(x))
    assert rotate(normal(0, 4, 2, 8), rope.cache, None).shape == (0, 4, 2, 8)
    x = normal(2, 8, 5, 3).transpose(1, 3).transpose(1, 2)
    torch.testing.assert_close(rotate(x, rope.cache, None), rope(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, None])
def test_a_decoder_with_fused_parts_computes_the_same(monkeypatch, dtype, scale_dtype):
    monkeypatch.setattr(fused, "has_kernels", lambda device: True)
    torch.manual_seed(0)
    with training.set_default_dtype(dtype), DEVICE:
        model = llama2(64, 2, 4, 2, 32, max_seq_len=64, intermediate_dim=48)
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        norm.to(scale_dtype)  # those that train are in float32
    tokens = torch.randint(64, (2, 9), device=DEVICE)
    expected = model(tokens)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), model.tok_embeddings.weight)
    fused.fuse_parts(model, torch.device("cuda"))
    model = copy.deepcopy(model)
    assert model.norm.forward.__self__ is model.norm  # and not that of the model that was copied
    found = model(tokens)
    (grad,) = torch.autograd.grad(found.square().sum(), model.tok_embeddings.weight)
    size = 1e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert is_near(found, expected.double(), size) and is_near(grad, expected_grad.double(), 4 * size)


class Kernels(TorchDispatchMode):
    """Counts operations that are not views or allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += not func.is_view and not name.startswith(("empty", "new_empty", "detach"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "products"), [("int8", "int8"), ("nf4", "full")])
def test_a_quantized_linear_takes_few_kernels(monkeypatch, kind, products):
    """With torch alone, int8 takes 15 in forward and 16 in backward, and this NF4 weight takes 7 and 4."""
    monkeypatch.setattr(formats, "has_kernels", lambda device: True)
    weight = formats.FORMATS[kind].empty(torch.Size((4096, 4096)), torch.device("meta"))
    x = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    monkeypatch.setattr(formats, "_PIECE", formats._PIECE_ON_CUDA)
    weight.dequantize(x.dtype)  # makes the table of NF4, once
    with Kernels() as forward:
        product = weight.linear(x, products)
    with Kernels() as backward:
        torch.autograd.grad(product, x, torch.empty_like(product))
    most = {"int8": (2, 3), "nf4": (2, 2)}[kind]
    assert (forward.count, backward.count) <= most and min(forward.count, backward.count) > 0


def test_block_sizes_are_searched_once_for_each_weight_shape():
    """And not for each number of rows, as torchao does: rows that vary in length would be slow."""
    assert kernels._int8_kernel().keys == ["N", "K", "stride_bk"]


def test_rows_of_any_number_are_one_compiled_graph(with_kernels):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = Int8Weight.quantize(normal(8, 64))

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def compiled(x):
        codes, scale = kernels.quantize_rows(x, None)
        return kernels.int8_product(codes, weight.codes.t(), scale, weight.scale, x.dtype)

    for num_rows in (5, 9, 33):
        x = normal(num_rows, 64)
        torch.testing.assert_close(compiled(x), weight.linear(x, "int8"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import owlore_tune.kernels

owlore_tune.kernels.HAS_TRITON = True  # in a build of torch for CPUs too
from owlore_tune.kernels import quantize, rotary

CONSTANTS = {"TINY": 1e-38, "HAS_FACTORS": True, "SIZE": 64, "SIGN": -1.0, "HAS_POSITIONS": True, "BLOCK": 1024}
FLOATS = ("factors_ptr", "scale_ptr", "cache_ptr")
TYPES = {"codes_ptr": "*i8", "positions_ptr": "*i64"} | dict.fromkeys(FLOATS, "*fp32")
for kernel in (quantize._quantize_rows, quantize._dequantize_nf4, rotary._rotate):
    types = {name: TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    constants = {name: value for name, value in CONSTANTS.items() if name in types}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    for capability in (80, 89, 90, 100):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(kernel.fn.__name__, capability, len(compiled.asm["cubin"]) > 1000)
"""


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, which needs no GPU. The interpreter accepts more than the compiler."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    names = ("_quantize_rows", "_dequantize_nf4", "_rotate")
    expected = [f"{name} {capability} True" for name in names for capability in (80, 89, 90, 100)]
    assert done.stdout.splitlines() == expected, done.stderr
