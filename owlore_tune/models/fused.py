"""torchtune's norms and rotary embeddings in forms that take one launch on a GPU."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

from owlore_tune.kernels import has_kernels
from owlore_tune.kernels.rotary import rotate


def fuse_parts(model: nn.Module, device: torch.device) -> None:
    """Let norms and rotary embeddings of a torchtune decoder on a GPU compute with fused operations.

    Results are the same within rounding. Other kinds of embeddings, such as Qwen's, do not change. The functions become
    methods, because torch compiles a partial anew for each module.
    """
    if device.type != "cuda":
        return
    for module in model.modules():
        if type(module) is RMSNorm:
            module.forward = MethodType(_norm, module)
        elif type(module) in (RotaryPositionalEmbeddings, Llama3ScaledRoPE):
            module.forward = MethodType(_rotated, module)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """torch's fused norm sums in float32, so no copy in float32 is needed."""
    if norm.scale.dtype != x.dtype:  # for which torch has no fused norm
        return RMSNorm.forward(norm, x)
    return F.rms_norm(x, norm.normalized_shape, norm.scale, norm.eps)


def _rotated(rope: RotaryPositionalEmbeddings, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
    if not has_kernels(x.device):
        return type(rope).forward(rope, x, input_pos=input_pos)
    return rotate(x, rope.cache, input_pos)
