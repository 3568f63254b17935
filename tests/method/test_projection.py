import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from owlore_tune.data.datasets import mmlu_dev_dataset
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.smollm2 import smollm2_135m
from owlore_tune.optim.bases import OVERSAMPLING, Basis, is_right, of_gradient, signs, sketch, svd_basis, truncate


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def range_finder_of_product(left: torch.Tensor, right: torch.Tensor, rank: int, **options) -> Basis:
    (basis,) = truncate([sketch(left, right, rank, **options)], rank)
    return basis


def range_finder(grad: torch.Tensor, rank: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The range finder of a whole gradient, as that of a Linear with one token for each output."""
    basis = range_finder_of_product(torch.eye(len(grad), dtype=grad.dtype), grad, rank, **options)
    if basis.is_given:
        largest = grad.abs().max()
        torch.testing.assert_close(basis.low / largest, grad @ basis.columns / largest, atol=1e-5, rtol=1e-5)
    return basis.columns, basis.is_given


def captured(grad: torch.Tensor, basis: torch.Tensor) -> float:
    """Return the share of the energy of ``grad`` in the basis."""
    return ((grad @ basis).square().sum() / grad.square().sum()).item()


def decaying(m: int, n: int, dtype=torch.float64) -> torch.Tensor:
    """Return a matrix with singular values 1/i."""
    torch.manual_seed(0)
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return ((u / torch.arange(1, k + 1)) @ v.T).to(dtype)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("warm", [False, True])
def test_basis_is_orthonormal_and_nearly_optimal(shape, warm):
    grad = decaying(*shape)
    start = range_finder(grad + 0.01 * torch.randn(shape), 8, generator=generator())[0] if warm else None
    basis, is_given = range_finder(grad, 8, generator=generator(), start=start)
    assert basis.shape == (shape[1], 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)
    best, best_is_given = svd_basis(grad, 8)
    assert is_given and best_is_given
    assert captured(grad, basis) > 0.995 * captured(grad, best)


def test_directions_of_small_singular_values_are_found_in_float32():
    """Those of 1e-4 of the largest: their squares are below the precision of a product."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 200, dtype=torch.float64)).Q for size in (256, 384))
    grad = u * torch.cat([torch.logspace(0, -4, 64), torch.full((136,), 1e-5)]) @ v.T
    basis, _ = range_finder(grad.float(), 64, generator=generator())
    missed = v[:, :64] - basis.double() @ (basis.double().T @ v[:, :64])
    assert torch.linalg.matrix_norm(missed, 2) < 0.05


def test_the_largest_entry_of_each_column_is_positive():
    basis, _ = range_finder(decaying(30, 20), 5, generator=generator())
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(signs(basis), torch.ones(5)) and torch.equal(signs(-basis), -torch.ones(5))
    for dtype in (torch.float32, torch.float64):
        tied = torch.tensor([[0.6, -0.3], [-0.6, 0.3]], dtype=dtype)
        assert torch.equal(signs(tied).abs(), torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_with_one_value_that_is_not_finite_has_no_basis(value):
    grad = torch.randn(30, 20, generator=generator())
    grad[3, 4] = value
    for start in (None, torch.linalg.qr(torch.randn(20, 5, generator=generator())).Q):
        assert not range_finder(grad, 5, generator=generator(), start=start)[1]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_gradients(factor):
    grad = factor * decaying(30, 20, torch.float32)
    basis, is_given = range_finder(grad, 5, generator=generator())
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
    assert is_given and captured(grad / factor, basis) > 0.8


def test_a_zero_gradient_has_no_basis():
    assert not range_finder(torch.zeros(30, 20), 5, generator=generator())[1]
    assert not svd_basis(torch.zeros(30, 20), 5)[1]


def test_eigenvalues_that_do_not_converge_count_as_no_basis(monkeypatch):
    """The optimizer then keeps its old basis. GaLore's SVD ends the run."""

    def fail(gram):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    basis, is_given = range_finder(torch.randn(32, 24), 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)
    assert not is_given


def test_one_of_several_decompositions_may_fail(monkeypatch):
    eigh = torch.linalg.eigh

    def failing(grams):
        if len(grams) > 1 or grams[0, 0, 0] == worst:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(grams)

    grads = [decaying(30, 20) * factor for factor in (1.0, 2.0, 3.0)]
    sketches = [sketch(torch.eye(30), grad, 4, generator=generator()) for grad in grads]
    expected = list(truncate(list(sketches), 4))
    worst = sketches[1].gram[0, 0]
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = list(truncate(list(sketches), 4))
    assert [bool(basis.is_given) for basis in found] == [True, False, True]
    for index in (0, 2):
        torch.testing.assert_close(found[index].columns, expected[index].columns)


def test_rank_deficient_gradient_is_captured_whole():
    torch.manual_seed(0)
    grad = torch.randn(30, 2) @ torch.randn(2, 20)
    basis, _ = range_finder(grad, 5, generator=generator())
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
    assert captured(grad, basis) > 0.99999


def test_the_shape_rule_projects_the_shorter_side():
    assert is_right(torch.Size([4, 9]), "right")
    assert not is_right(torch.Size([4, 9]), "shape")
    assert is_right(torch.Size([9, 4]), "shape")
    assert is_right(torch.Size([4, 4]), "shape")


def test_energy_on_real_gradients_of_smollm2(smollm2_dir):
    """Every Linear of three layers: at least 0.99 of the energy that the exact rank-128 basis captures."""
    from owlore_tune.checkpoints.hf_weights import HFCheckpointer

    with torch.device("meta"):
        model = smollm2_135m()
    checkpointer = HFCheckpointer(str(smollm2_dir), "LLAMA3_2")
    checkpointer.load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    sample = mmlu_dev_dataset(HFChatTokenizer(str(smollm2_dir)))[0]
    tokens, labels = torch.tensor([sample["tokens"]]), torch.tensor(sample["labels"])
    layers = (0, 14, 29)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"layers.{i}.") for i in layers) and parameter.ndim == 2)
    F.cross_entropy(model(tokens)[0, :-1], labels[1:]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 21
    for grad in grads:
        basis, _ = range_finder(grad, 128, generator=generator())
        best, _ = svd_basis(grad, 128)
        assert captured(grad, basis) >= 0.99 * captured(grad, best)


class Sizes(TorchDispatchMode):
    """The largest tensor in float32 or float64."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if torch.is_tensor(output) and output.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, output.numel())
        return output


def test_a_16_bit_gradient_on_cuda_is_not_copied_to_float32():
    """With tensors that have no data, so that no GPU is needed."""
    with FakeTensorMode():
        grad = torch.empty(70, 64, dtype=torch.bfloat16, device="cuda")
        x = torch.empty(70, 48, dtype=torch.bfloat16, device="cuda")
        basis = torch.empty(48, 8, device="cuda")
        with Sizes() as sizes:
            low = of_gradient(grad.T, x, basis, torch.float32)
    assert low.dtype == torch.float32 and low.shape == (64, 8)
    assert sizes.largest < x.numel()


@pytest.mark.parametrize(("inner", "outer"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_factors_of_two_dtypes_are_multiplied(inner, outer, monkeypatch):
    """Autocast gives a Linear with a float32 input a gradient in bfloat16. Tensors without data take the GPU's path."""
    mm = torch.mm

    def strict_mm(one, other, **options):
        assert one.dtype == other.dtype
        return mm(one, other, **options)

    monkeypatch.setattr(torch, "mm", strict_mm)
    grad, x = torch.empty(70, 64, dtype=outer, device="meta"), torch.empty(70, 48, dtype=inner, device="meta")
    low = of_gradient(grad.T, x, torch.empty(48, 8, device="meta"), torch.float32)
    assert low.dtype == torch.float32 and low.shape == (64, 8)


def test_16_bit_factors_are_used_a_few_rows_at_a_time(monkeypatch):
    """The basis is that of a float32 copy, which never exists as a whole."""
    left, right = (torch.randn(70, size, generator=generator()).bfloat16() for size in (64, 48))
    options = {"rank": 8}
    expected = range_finder_of_product(left.float(), right.float(), generator=generator(), **options)
    monkeypatch.setattr("owlore_tune.optim.bases._PIECE", 480)  # 7 to 10 rows
    with Sizes() as sizes:
        found = range_finder_of_product(left, right, generator=generator(), **options)
    for name, one in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), one, atol=1e-4, rtol=1e-4)
    assert sizes.largest < right.numel()


@pytest.mark.parametrize(("t", "m", "n"), [(5, 24, 30), (0, 8, 9), (40, 7, 30), (40, 30, 7)])
def test_bases_of_few_tokens_and_thin_weights(t, m, n):
    left, right = (torch.randn(t, size, generator=generator()) for size in (m, n))
    rank = min(m, n) - 2
    assert rank + OVERSAMPLING > min(m, n)
    found = range_finder_of_product(left, right, rank, generator=generator())
    basis, is_given = found.columns, found.is_given
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    assert is_given == (t > 0)
