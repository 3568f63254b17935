"""Time of a basis refresh: the range finder with cold and warm start against torch.linalg.svd.

    python benchmarks/refresh.py [--output benchmarks/refresh.md]

The singular values of the matrix decay like 1/i, similar to those of gradients. Rounds are interleaved.
"""

import statistics
import time
from collections.abc import Callable

import torch
from report import command, machine, parser, publish

from owlore_tune.optim.projection import range_finder, svd_basis

SIZE, RANK, ROUNDS = 2048, 128, 7


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    args = parser(__doc__).parse_args()
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    grad = u / torch.arange(1, SIZE + 1) @ v.T
    noisy = grad + 1e-4 * torch.randn(SIZE, SIZE, generator=generator)
    start, _ = range_finder(noisy, RANK, generator=generator)
    calls = {
        "torch.linalg.svd": lambda: svd_basis(grad, RANK),
        "range finder, cold": lambda: range_finder(grad, RANK, generator=generator),
        "range finder, warm": lambda: range_finder(grad, RANK, generator=generator, start=start),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = calls["torch.linalg.svd"]()[1]
    lines = [
        "# Time of a basis refresh",
        "",
        f"{SIZE} × {SIZE}, rank {RANK}, float32, median of {ROUNDS} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| method | median, s | speedup over svd | captured energy / optimum |",
        "|---|---|---|---|",
    ]
    for name, call in calls.items():
        speedup = medians["torch.linalg.svd"] / medians[name]
        lines.append(f"| {name} | {medians[name]:.4f} | {speedup:.1f}× | {call()[1] / best:.4f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
