"""Edits of a small decoder by each method are equal to stored results.

To store results after an intended change, run ``MALLEABLE_STORE_RESULTS=1 pytest tests/lightning_modules/editing/test_stored_edits.py``, and state
the change and its reason in the commit message.
"""

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_editing import decoder, tokenizer
from small_facts import NEW, TEXTS

from malleable.lightning_modules.editing.editor import AlphaEditor
from malleable.lightning_modules.editing.fine_tune import FineTuneSettings
from malleable.lightning_modules.editing.settings import EditSettings, Method
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold

STORED = Path(__file__).with_name("stored_edits.json")
SETTINGS: dict[str, Any] = {
    "layers": (0, 1),
    "ridge": 0.5,
    "moment_weight": 10.0,
    "threshold": Threshold("relative_energy", 0.1),
    "targets": TargetSettings(lr=0.1, steps=6, clamp=2.0),
    "tuning": FineTuneSettings(lr=1e-3, steps=5),
    "contexts": 0,
    "batch_size": 2,
}


def pattern(*shape: int, shift: int = 0) -> torch.Tensor:
    """Values by a formula: random generators may change with a release of PyTorch."""
    number = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(number, dtype=torch.float64) ** 1.1 + shift).reshape(shape)


def results(method: str) -> dict[str, Any]:
    """Edit three facts in two batches, and describe the change of each layer by its norm and two projections."""
    model = decoder(layers=3)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(0.3 * pattern(*parameter.shape, shift=number) + (parameter.ndim == 1))
    editor = AlphaEditor(model, tokenizer("bos"), EditSettings(**SETTINGS, method=method))
    editor.fit_statistics(TEXTS[:24])
    records = editor.edit(NEW[:3])
    found: dict[str, Any] = {}
    for layer in editor.layers:
        change = editor.change(layer).double()
        rows, columns = pattern(change.shape[0], shift=1), pattern(change.shape[1], shift=2)
        found[f"layer {layer}"] = [float(change.norm()), float(rows @ change @ columns), float((change @ columns).norm())]
        if method == "alpha_edit":
            found[f"directions {layer}"] = [editor.retained(layer)]
    found["loss"], found["nll"] = ([float(getattr(record, name)) for record in records] for name in ("loss", "nll"))
    found["steps"] = [record.steps for record in records]
    found["residuals"] = [value for record in records for value in record.residuals]
    return found


@pytest.mark.parametrize("method", get_args(Method))
def test_edits_equal_stored_results(method):
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
    found = results(method)
    if os.environ.get("MALLEABLE_STORE_RESULTS"):
        STORED.write_text(json.dumps(dict(sorted((stored | {method: found}).items())), indent=1) + "\n")
        pytest.skip("stored")
    assert stored[method].keys() == found.keys()
    for key, values in found.items():
        expected = torch.tensor(stored[method][key], dtype=torch.double)
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.double), expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{method}, {key}: {text}"
        )


def test_methods_change_both_layers_differently():
    stored = json.loads(STORED.read_text())
    for layer in ("layer 0", "layer 1"):
        norms = [round(stored[method][layer][0], 6) for method in get_args(Method)]
        assert min(norms) > 1e-3
        assert len(set(norms)) == len(norms)
