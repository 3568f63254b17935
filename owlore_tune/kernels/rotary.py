"""Rotary position embeddings in one launch."""

import torch
from torch import Tensor

from owlore_tune.kernels import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _rotate(
        x_ptr,
        cache_ptr,
        positions_ptr,
        out_ptr,
        num_tokens,
        num_heads,
        half,
        batch_stride,
        token_stride,
        head_stride,
        SIGN: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # of a batch, and in it a token
        token = row % num_tokens
        position = tl.load(positions_ptr + row) if HAS_POSITIONS else token
        x_ptr += (row // num_tokens) * batch_stride + token * token_stride
        out_ptr += row * num_heads * half * 2
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_in = at < num_heads * half
        head, pair = at // half, at % half
        angle = cache_ptr + (position * half + pair) * 2
        cos = tl.load(angle, mask=is_in, other=0.0)
        sin = tl.load(angle + 1, mask=is_in, other=0.0) * SIGN
        first = tl.load(x_ptr + head * head_stride + pair * 2, mask=is_in, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + head * head_stride + pair * 2 + 1, mask=is_in, other=0.0).to(tl.float32)
        tl.store(out_ptr + at * 2, first * cos - second * sin, mask=is_in)
        tl.store(out_ptr + at * 2 + 1, second * cos + first * sin, mask=is_in)


torch.library.define("owlore::rotate", "(Tensor x, Tensor cache, Tensor? positions, bool forward) -> Tensor")


@torch.library.impl("owlore::rotate", ("cpu", "cuda"))
def _launch(x: Tensor, cache: Tensor, positions: Tensor | None, forward: bool) -> Tensor:
    out = _empty(x, cache, positions, forward)
    if out.numel():
        b, s, heads, width = x.shape
        block = min(triton.next_power_of_2(heads * width // 2), 1024)
        positions = None if positions is None else positions.expand(b, s).contiguous()
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _rotate[(b * s, triton.cdiv(heads * width // 2, block))](
                x, cache, positions, out, s, heads, width // 2, *x.stride()[:3], SIGN=1.0 if forward else -1.0,
                HAS_POSITIONS=positions is not None, BLOCK=block,
            )  # fmt: skip
    return out


@torch.library.register_fake("owlore::rotate")
def _empty(x: Tensor, cache: Tensor, positions: Tensor | None, forward: bool) -> Tensor:
    return x.new_empty(x.shape)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cache, positions):
        ctx.save_for_backward(cache, positions)
        return torch.ops.owlore.rotate(_with_whole_heads(x), cache, positions, True)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.owlore.rotate(_with_whole_heads(grad), *ctx.saved_tensors, False), None, None


def _with_whole_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(x: Tensor, cache: Tensor, positions: Tensor | None) -> Tensor:
    """Rotate pairs of neighboring values by the angles of their token's position, in float32.

    Args:
        x: (b, s, heads, width), differentiable.
        cache: (max positions, width / 2, 2) float32, cosines and sines.
        positions: (b, s) or (1, s) long; None for those from 0 on.

    Returns:
        (b, s, heads, width) in the dtype of ``x``.
    """
    return _Rotate.apply(x, cache, positions)
