"""Compiled training and evaluation passes of language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from malleable.lightning_modules.functional.language.pass_forms import bare_model


@dataclass
class Compile:
    """Settings of ``torch.compile`` for the decoder of a language model: embeddings, layers and last norm, without the language-model head.

    The passes of training, of validation and of a frozen reference run compiled. Decoding with a cache, edits and exports run uncompiled with the
    same weights. Names of parameters do not change. With gradient checkpointing, preference losses disable dropout in each block, which breaks the
    graph between blocks. Supervised losses have one graph.

    Attributes:
        backend: Name of the backend. ``inductor`` needs a C++ compiler on a CPU and Triton on a GPU.
        mode: Mode of ``inductor``. ``reduce-overhead`` uses CUDA graphs, and the ``max-autotune`` modes try several kernels; these are not tested.
        dynamic: Compile one graph for all batch sizes (true), one graph for each size (false), or one graph for the first size and a dynamic graph
            once sizes vary (``None``).
    """

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    dynamic: bool | None = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function."""
        mode = {} if self.mode == "default" else {"mode": self.mode}
        return torch.compile(function, backend=self.backend, dynamic=self.dynamic, **mode)  # type: ignore[call-overload, no-any-return]


_ACTIVE: ContextVar[bool] = ContextVar("compiled passes", default=False)


@contextmanager
def compiled_passes() -> Iterator[None]:
    """Enable the compiled decoders; outside this context they run uncompiled."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def compile_decoder(model: nn.Module, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Compile the decoder of a language model in place; a second call does nothing.

    The compiled code is used in :func:`compiled_passes` only, because Dynamo ignores hooks that are registered later, e.g. by edits, and recompiles
    for each length of a cache.

    Args:
        model: Hugging Face causal language model, with or without PEFT.
        compiler: Function that compiles a function.
    """
    decoder = bare_model(model).base_model
    if decoder._compiled_call_impl is not None:
        return
    plain, compiled = decoder._call_impl, compiler(decoder._call_impl)

    def call(*args: Any, **options: Any) -> Any:
        return (compiled if _ACTIVE.get() and not options.get("use_cache") else plain)(*args, **options)

    decoder._compiled_call_impl = call
