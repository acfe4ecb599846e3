"""What the device can do: rates of matrix products, and the bandwidth of its memory, on random data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.bench.gpu.plan import Plan, Row, median_seconds


def run(plan: Plan) -> Iterator[Row]:
    """Measure a product of square matrices in each number type, and a copy."""
    size = plan.pick(8192, 128)
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        left, right = (plan.normal(number, size, size).to(plan.device).to(dtype) for number in (0, 1))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        seconds = median_seconds(plan.device, lambda left=left, right=right: left @ right, 10)
        torch.backends.cuda.matmul.allow_tf32 = False
        yield {"what": f"product {size} x {size} x {size}, {name}", "ceiling": name, "rate": 2 * size**3 / seconds}
    source = torch.randn(plan.pick(1 << 30, 1 << 16), device=plan.device)
    target = torch.empty_like(source)
    seconds = median_seconds(plan.device, lambda: target.copy_(source), 10)
    yield {"what": "copy, bytes read and written", "ceiling": "bandwidth", "rate": 2 * source.nbytes / seconds}
