"""Forward and backward of a model on tensors without data, with a count of live bytes."""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchtune import training

from owlore_tune.models.decoder import Decoder, find_layers, init_rope
from owlore_tune.models.fused import fuse_parts
from owlore_tune.models.hf_experts import Experts
from owlore_tune.models.output import set_output, takes_hidden_states
from owlore_tune.quantized.formats import format_of
from owlore_tune.quantized.linear import attach


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


class PlannedStep:
    """Forward and backward of a copy of ``model`` without data.

    Args:
        model: on the meta device; it is not modified.
        quantized: its modules whose weights are quantized.
    """

    def __init__(
        self, model: Decoder, loss_fn: Any, shape: StepShape, device: torch.device, quantized: set[nn.Module]
    ) -> None:
        self._source, self._loss_fn, self._shape, self._device = model, copy.copy(loss_fn), shape, device
        self._quantized = quantized
        self.model = copy.deepcopy(model)
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
        with FakeTensorMode(allow_non_fake_inputs=True), self.tracker:
            _materialize(self.model, self._source, self._device, self._shape, self._quantized)
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

    def run(self) -> None:
        """Forward and backward. Gradients of the micro-batch before exist if steps have several."""
        for parameter in self._trained:
            parameter.grad = None
            if self._shape.accumulates:
                self.tracker.label = "gradients"
                parameter.grad = torch.empty_like(parameter)
        _forward_backward(self.model, self._loss_fn, self._shape, self._device, self.tracker)

    def bytes_at_peak(self, *, bases: int = 0) -> dict[str, int]:
        """Bytes by label at the peak of all runs, of which ``bases`` are those of bases."""
        largest = self.tracker.largest
        parts = {label: largest[label] for label in _LABELS} | {"bases": bases}
        parts["temporary"] = max(0, largest.total() - sum(parts.values()) + parts["temporary"])
        return parts


def _forward_backward(
    model: Decoder, loss_fn: Any, shape: StepShape, device: torch.device, tracker: "_Tracker"
) -> None:
    size = (shape.batch_size, shape.seq_len)
    tracker.label = "activations"
    tokens = torch.zeros(size, dtype=torch.long, device=device)
    extra: dict[str, Tensor] = {}
    if shape.packed:
        extra["mask"] = torch.ones(*size, shape.seq_len, dtype=torch.bool, device=device)
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


def _materialize(
    fake: nn.Module, model: nn.Module, device: torch.device, shape: StepShape, quantized: set[nn.Module]
) -> None:
    """Give ``fake`` the parameters and buffers of ``model`` on ``device``, without data."""
    pairs: Any = zip(list(fake.modules()), list(model.modules()), strict=True)
    for module, source in pairs:
        is_quantized = source in quantized
        for name, parameter in source._parameters.items():
            if parameter is not None:
                size = (0,) if is_quantized and name == "weight" else parameter.shape
                module._parameters[name] = nn.Parameter(torch.empty(size, dtype=parameter.dtype, device=device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if is_quantized:
            in_layer = isinstance(source, nn.Linear) and source is not model.output
            kind, products = (shape.weights, shape.products) if in_layer else ("int8", "full")
            weight = format_of(source.weight.shape, kind).empty(source.weight.shape, device)
            attach(module, weight, products, source.weight.dtype)


_LABELS = ("weights", "projected", "gradients", "activations", "logits", "temporary")


class _Tracker(TorchDispatchMode):
    """Counts bytes of live tensors by the label at their creation. ``largest`` has the counts at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "weights"
        self.largest: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._labels: dict[int, str] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # the most frequent call
        outputs = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, outputs)
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
