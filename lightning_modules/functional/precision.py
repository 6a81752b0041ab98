"""Full-precision computation under autocast, half-precision weights and reduced-precision matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda", "mps", "xpu")
_BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def full(part: Tensor) -> Tensor:
    """Convert half precision to single precision; return other dtypes unchanged."""
    return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products under autocast; ``None`` if it is disabled."""
    # Autocast raises an error for devices that it does not know, e.g. `meta`.
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it runs with autocast disabled.

    Rankings depend on small differences of large scores, which half precision does not resolve.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        active = [device for device in DEVICES if torch.is_autocast_enabled(device)]
        if not active:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in active:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return guarded


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, also after ``torch.set_float32_matmul_precision("high")`` (TF32)."""
    before = _product_precisions()
    if all(precision in ("ieee", "none", "highest") for precision in before):
        yield
        return
    _set_product_precisions(["highest"] if len(before) == 1 else ["ieee"] * len(before))
    try:
        yield
    finally:
        _set_product_precisions(before)


def _product_precisions() -> list[str]:
    """Return the precision of each backend; before torch 2.9, one precision for all."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [backend.fp32_precision for backend in _BACKENDS]


def _set_product_precisions(names: list[str]) -> None:
    if len(names) == 1:
        torch.set_float32_matmul_precision(names[0])
        return
    for backend, name in zip(_BACKENDS, names, strict=True):
        backend.fp32_precision = name
