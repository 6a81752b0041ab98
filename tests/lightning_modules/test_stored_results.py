"""Losses, gradients and outputs of each module on fixed weights and rows, as an earlier release computed them.

A change that is meant is stored by ``MALLEABLE_STORE_RESULTS=1 pytest tests/lightning_modules/test_stored_results.py``; the commit message
says what changed and why.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import CASES, make

from malleable.lightning_modules.recommendation.baselines import Baseline, count_rows

STORED = Path(__file__).with_name("stored_results.json")
STEPS = 3


def set_weights(module: Any) -> None:
    """Set weights by a formula: random generators may change with a release of PyTorch."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(module.named_parameters())):
            values = 0.4 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) ** 1.1 + number)
            parameter.copy_(values.reshape(parameter.shape))


def results(name: str) -> dict[str, Any]:
    """Three steps of gradient descent (baselines count instead), and what the module then gives."""
    case, module = CASES[name], make(name)
    module.configure_model()
    set_weights(module)
    if isinstance(module, Baseline):
        count_rows([module], case.rows())
    batch = case.collate(case.rows()[:6])
    found: dict[str, Any] = {"loss": [], "gradient": []}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for _ in range(STEPS):
        output = module.train().compute_loss(batch)
        gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        used = [(parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        found["loss"].append(output.loss.item())
        found["gradient"].append(sum(float(gradient.square().sum()) for _, gradient in used) ** 0.5)
        with torch.no_grad():
            for parameter, gradient in used:
                parameter -= 0.1 * gradient
    found["extras"] = {key: float(value) for key, value in sorted(output.extras.items())}
    found["output"] = case.output(module).flatten().tolist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_stored_ones(name):
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
    found = results(name)
    if os.environ.get("MALLEABLE_STORE_RESULTS"):
        STORED.write_text(json.dumps(dict(sorted((stored | {name: found}).items())), indent=1) + "\n")
        pytest.skip("stored")
    assert name in stored, f"store the results of {name}: see the head of this file"
    assert stored[name].keys() == found.keys()
    assert stored[name]["extras"].keys() == found["extras"].keys()
    for key, value in found.items():
        now, then = (list(part.values()) if isinstance(part, dict) else part for part in (value, stored[name][key]))
        torch.testing.assert_close(torch.tensor(now), torch.tensor(then), rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{name}, {key}: {text}")
