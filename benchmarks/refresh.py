"""Time of a basis refresh: the range finder with cold and warm start against torch.linalg.svd.

    python benchmarks/refresh.py [--output benchmarks/refresh.md]

The gradient is a product of an output's gradient and an input with 512 tokens. Its singular values decay like 1/i,
similar to those of gradients. Only the SVD needs the product. Rounds are interleaved.
"""

import statistics
import time
from collections.abc import Callable

import torch
from report import command, machine, parser, publish

from owlore_tune.optim.projection import range_finder, svd_basis

SIZE, TOKENS, RANK, ROUNDS = 2048, 512, 128, 7


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    args = parser(__doc__).parse_args()
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(SIZE, TOKENS, generator=generator)).Q for _ in range(2))
    outputs, inputs = u.T / torch.arange(1, TOKENS + 1)[:, None], v.T
    noisy = inputs + 1e-2 * torch.randn(TOKENS, SIZE, generator=generator)
    start, _ = range_finder(outputs, noisy, RANK, generator=generator)
    calls = {
        "torch.linalg.svd": lambda: svd_basis(outputs.T @ inputs, RANK),
        "range finder, cold": lambda: range_finder(outputs, inputs, RANK, generator=generator),
        "range finder, warm": lambda: range_finder(outputs, inputs, RANK, generator=generator, start=start),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    grad = outputs.T @ inputs
    best = (grad @ svd_basis(grad, RANK)[0]).square().sum()
    lines = [
        "# Time of a basis refresh",
        "",
        f"{SIZE} × {SIZE}, {TOKENS} tokens, rank {RANK}, float32, median of {ROUNDS} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| method | median, s | speedup over svd | captured energy / optimum |",
        "|---|---|---|---|",
    ]
    for name, call in calls.items():
        speedup = medians["torch.linalg.svd"] / medians[name]
        captured = (grad @ call()[0]).square().sum()
        lines.append(f"| {name} | {medians[name]:.4f} | {speedup:.1f}× | {captured / best:.4f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
