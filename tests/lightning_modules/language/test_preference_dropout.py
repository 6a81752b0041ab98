"""Preference steps run without dropout, in layers that drop by functions, too, and where activations are recomputed."""

import math
from contextlib import nullcontext

import pytest
import torch
from architectures import DROPOUT, tiny_model
from tiny import batch_of
from transformers import AutoConfig

from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.language.config import dropout_off
from malleable.lightning_modules.language.preference import preference_step
from malleable.lightning_modules.losses.preference import Sigmoid

OTHERS = ("falcon", "xglm", "biogpt", "phi", "gpt_neox", "phi3", "stablelm", "starcoder2")
# The first ones drop in functions, in attention, and in modules; the others repeat one of them.
KINDS = ["opt", "bloom", "gpt2", "llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
ROWS = [{"sample_id": row, "prompt": [5 + row, 6, 7], "answers": [[8, 9, 2], [10 + row, 2]]} for row in range(3)]


def dropping(kind: str, checkpointing: bool):
    """A model in training mode with every kind of dropout that its configuration names."""
    names = [name for name in vars(AutoConfig.for_model(kind)) if name.endswith(DROPOUT)]
    assert names
    model = tiny_model(kind, **dict.fromkeys(names, 0.3)).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_start_equal_and_recomputation_keeps_gradients(kind):
    grads = []
    for checkpointing in (False, True):
        model, batch = dropping(kind, checkpointing), batch_of(ROWS)
        with evaluating(model):
            batch.reference_logps = answer_logps(model, batch)
        output = preference_step(model, batch, Sigmoid(beta=1.0))
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-5)
        # After the context of the step: what is recomputed now must not drop either.
        output.loss.backward()
        assert all(module.training for module in model.modules())
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("off", [True, False])
def test_the_context_disables_dropout(off):
    model = dropping("opt", checkpointing=True)
    with dropout_off(model) if off else nullcontext():
        first, second = (model(input_ids=torch.tensor([[5, 6, 7]])).logits for _ in range(2))
    assert torch.equal(first, second) == off
