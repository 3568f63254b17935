"""Forward and backward of a model on tensors without data, with a count of live bytes."""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training

from owlore_tune.layers.grouped import group_experts
from owlore_tune.models.decoder import Decoder, find_layers, init_rope
from owlore_tune.models.experts import Experts
from owlore_tune.models.fused import fuse_parts
from owlore_tune.models.output import set_output, takes_hidden_states
from owlore_tune.quantized.formats import format_of
from owlore_tune.quantized.linear import attach

META = torch.device("meta")


@dataclass(frozen=True)
class StepShape:
    """Settings of a training step that affect its memory."""

    batch_size: int
    seq_len: int  # tokens of the longest row
    packed: bool = False  # rows come with masks and positions
    accumulates: bool = False  # several micro-batches per step: gradients exist when the next forward begins
    checkpointing: bool = False  # activation checkpointing
    weights: str = "full"  # format of the layers, see `owlore_tune.quantized.formats`
    products: str = "full"
    validates: bool = False  # held-out losses in full precision are measured too


class PlannedStep:
    """Forward and backward of a copy of ``model`` without data.

    Args:
        model: on the meta device; it is not modified.
        quantized: its modules whose weights are quantized.
        sharded: whether FSDP2 shards the weights.
        fuses: whether the run uses `fuse_parts`, as our recipe does.
    """

    def __init__(
        self,
        model: Decoder,
        loss_fn: Any,
        shape: StepShape,
        device: torch.device,
        quantized: set[nn.Module],
        *,
        sharded: bool = False,
        fuses: bool = True,
    ) -> None:
        self._source, self._loss_fn, self._shape, self._device = model, copy.copy(loss_fn), shape, device
        self._quantized, self._sharded = quantized, sharded
        self.model = copy.deepcopy(model)
        if fuses:
            fuse_parts(self.model, device)
        with torch.device("cpu"):
            init_rope(self.model)  # it reads its own values, so it cannot run without data
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.even_routing = True
        self.tracker = _Tracker()
        self.weight_bytes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have tensors without data in the block."""
        with _fused_as_on(self._device), self.tracker:
            _materialize(self.model, self._source, self._shape, self._quantized)
            group_experts(self.model, self._device, sharded=self._sharded)
            self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
            if self._shape.checkpointing:
                layer_types = {type(layer) for layer in find_layers(self.model)}
                training.set_activation_checkpointing(self.model, auto_wrap_policy=layer_types)
            yield
            for hook in self._hooks:
                hook.remove()  # Python's garbage collector does not see them: the model would stay in memory

    def keep_gradients_of(self, trained: Iterable[Tensor]) -> None:
        """Count gradients of ``trained`` as kept for the optimizer, until `running` ends."""

        def relabel(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.tracker.relabel(parameter.grad, "gradients")

        self._trained = list(trained)
        self._hooks = [parameter.register_post_accumulate_grad_hook(relabel) for parameter in self._trained]

    def run(self, *, is_first: bool = False) -> None:
        """Forward and backward. Gradients exist before it if steps have several micro-batches, except for the first."""
        for parameter in self._trained:
            parameter.grad = None
            if self._shape.accumulates and not is_first:
                self.tracker.label = "gradients"
                parameter.grad = torch.empty_like(parameter)
        _forward_backward(self.model, self._loss_fn, self._shape, self.tracker)

    def bytes_at_peak(self, *, bases: int = 0) -> dict[str, int]:
        """Bytes by label at the peak of all runs, of which ``bases`` are those of bases."""
        largest = self.tracker.largest
        parts = {label: largest[label] for label in _LABELS} | {"bases": bases}
        parts["temporary"] = max(0, largest.total() - sum(parts.values()) + parts["temporary"])
        return parts


def _forward_backward(model: Decoder, loss_fn: Any, shape: StepShape, tracker: "_Tracker") -> None:
    size = (shape.batch_size, shape.seq_len)
    tracker.label = "activations"
    tokens = torch.zeros(size, dtype=torch.long, device=META)
    extra: dict[str, Tensor] = {}
    if shape.packed:
        extra["mask"] = torch.ones(*size, shape.seq_len, dtype=torch.bool, device=META)
        extra["input_pos"] = torch.zeros_like(tokens)
    set_output(model, loss_fn)
    if takes_hidden_states(loss_fn):
        hidden = model(tokens, **extra)
        tracker.label = "logits"
        loss = loss_fn.of_rows(hidden.flatten(0, 1), tokens.flatten())
        del hidden
    else:
        outputs = model(tokens, **extra)  # logits made here count as activations
        tracker.label = "logits"
        chunked = isinstance(outputs, list)
        loss = loss_fn(outputs, tokens) if chunked else loss_fn(outputs.flatten(0, 1), tokens.flatten())
        del outputs
    tracker.label = "temporary"
    loss.backward()


def _materialize(copied: nn.Module, model: nn.Module, shape: StepShape, quantized: set[nn.Module]) -> None:
    """Give ``copied`` the parameters and buffers of ``model`` as tensors that the tracker knows."""
    pairs: Any = zip(list(copied.modules()), list(model.modules()), strict=True)
    for module, source in pairs:
        is_quantized = source in quantized
        for name, parameter in source._parameters.items():
            if parameter is not None:
                size = (0,) if is_quantized and name == "weight" else parameter.shape
                module._parameters[name] = nn.Parameter(torch.empty(size, dtype=parameter.dtype, device=META))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=META)
        if is_quantized:
            in_layer = isinstance(source, nn.Linear) and source is not model.output
            kind, products = (shape.weights, shape.products) if in_layer else ("int8", "full")
            weight = format_of(source.weight.shape, kind).empty(source.weight.shape, META)
            attach(module, weight, products, source.weight.dtype)


@contextmanager
def _fused_as_on(device: torch.device) -> Iterator[None]:
    """In the block, tensors without data have fused attention and norms where ``device`` has them. torch would give
    them none.

    A function mode is not enough, because layers that are computed again in backward do not see it.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = partial(_attention, attention, device)
    if device.type == "cuda":
        F.rms_norm = partial(_norm, norm)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


def _norm(
    of_torch: Callable[..., Tensor], input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None
) -> Tensor:
    if weight is None or weight.dtype != input.dtype:  # which torch does not fuse
        return of_torch(input, normalized_shape, weight, eps)
    return _FusedNorm.apply(input, weight)  # type: ignore[no-any-return]


class _FusedNorm(torch.autograd.Function):
    """torch's norm on a GPU. It keeps its input, and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _attention(
    of_torch: Callable[..., Tensor],
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # the fused operations take fewer heads of keys as they are
) -> Tensor:
    is_even = value.shape[-1] == query.shape[-1]  # it is not in latent attention
    if device.type == "cpu" and (dropout_p or not is_even):  # which a CPU cannot fuse
        return of_torch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # it adds 0 or -inf
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_zeros(()))
    if not is_even:
        mask = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


_LABELS = ("weights", "projected", "gradients", "activations", "logits", "temporary")


class _Tracker(TorchDispatchMode):
    """Counts bytes of live tensors by the label at their creation. ``largest`` has the counts at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "weights"
        self.largest: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._labels: dict[int, str] = {}  # by storage
        self._made: dict[Any, tuple[Any, ...]] = {}  # size, stride and dtype of operations' results, by their arguments

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if (made := self._made.get(key)) is not None:
            size, stride, dtype = made
            output = torch.empty_strided(size, stride, dtype=dtype, device=META)
            self._add(output)
            return output
        outputs = func(*args, **kwargs)
        # torch takes long to find out the form of a result, and the layers repeat their operations.
        is_one = isinstance(outputs, Tensor) and outputs.is_meta and not func.is_view
        if is_one and outputs.untyped_storage()._cdata not in self._labels:
            self._made[key] = outputs.size(), outputs.stride(), outputs.dtype
        for output in outputs if isinstance(outputs, (list, tuple)) else [outputs]:
            if isinstance(output, Tensor):
                self._add(output)
        return outputs

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._labels:
            return
        self._labels[storage._cdata] = self.label
        self._now[self.label] += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        if self._now.total() > self.largest.total():
            self.largest = self._now.copy()

    def _remove(self, key: int, nbytes: int) -> None:
        self._now[self._labels.pop(key)] -= nbytes

    def relabel(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        self._now[self._labels[storage._cdata]] -= storage.nbytes()
        self._now[label] += storage.nbytes()
        self._labels[storage._cdata] = label


def _described(value: Any) -> Any:
    """A key for an operation's argument, without the values of tensors."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value
