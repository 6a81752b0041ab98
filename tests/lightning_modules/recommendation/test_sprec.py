"""SPRec's module: the loss that fits the batch, and a reference that is a cache."""

import math

import pytest
import torch
from tiny import TOKENS, batch_of, tiny_rows
from tiny_module import lora, ready, save_base

from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.preference import preference_step
from malleable.lightning_modules.losses.preference import IPO, Sigmoid
from malleable.lightning_modules.recommendation.sprec import SPRec


def pairs(count: int = 4, reference: torch.Tensor | None = None):
    rows = [row | {"answers": [row["answers"][0], TOKENS[(row["item_ids"][0] + 2) % 8]]} for row in tiny_rows(count)]
    if reference is not None:
        rows = [row | {"reference_logps": logps} for row, logps in zip(rows, reference.tolist(), strict=True)]
    return batch_of(rows)


def tuned(tmp_path) -> SPRec:
    """A module whose adapter is no longer zero, as when a phase of self-play begins."""
    module = ready(SPRec, language_model=lora(save_base(tmp_path / "base"), dropout=0.5))
    torch.manual_seed(1)
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_the_loss_depends_on_the_type_of_the_batch():
    module = ready(SPRec, loss=IPO(beta=0.5), sft_weight=0.3).train()
    answers = batch_of(tiny_rows(4))
    assert module.compute_loss(answers).loss.item() == pytest.approx(module.answer_loss(answers).loss.item())
    packed = batch_of([{"sample_id": 0, "input_ids": [2, 4, 5, 1], "document_ids": [1, 1, 1, 1]}])
    assert module.compute_loss(packed).loss.item() == pytest.approx(module.answer_loss(packed).loss.item())
    known = pairs(reference=torch.zeros(4, 2))
    expected = preference_step(module.model, known, module.loss, sft_weight=0.3)
    found = module.compute_loss(known)
    assert found.loss.item() == pytest.approx(expected.loss.item())
    assert found.extras.keys() == expected.extras.keys() >= {"rewards_margins", "logps_chosen"}


def test_the_cached_reference_equals_the_current_model(tmp_path):
    """A frozen copy of the adapter gives what was cached when the phase began, also after the policy has moved on."""
    module, live = tuned(tmp_path), tuned(tmp_path)
    with torch.no_grad():
        cached = answer_logps(module.model, pairs())
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(3):
        with torch.no_grad():
            now = answer_logps(live.model, pairs())
        torch.testing.assert_close(now, cached, atol=1e-6, rtol=0)
        losses = [module.compute_loss(pairs(reference=reference)).loss for reference in (cached, now)]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
        assert (losses[0].item() == pytest.approx(math.log(2), abs=1e-6)) == (step == 0)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()


def test_the_base_without_adapter_is_not_the_reference(tmp_path):
    """The adapter is continued from phase to phase: switched off, it gives the raw base model, another reference."""
    module = tuned(tmp_path)
    with torch.no_grad():
        reference = answer_logps(module.model, pairs())
        with module.model.disable_adapter():
            base = answer_logps(module.model, pairs())
    assert (reference - base).abs().max() > 0.1
    module.train()
    assert module.compute_loss(pairs(reference=reference)).loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert module.compute_loss(pairs(reference=base)).loss.item() != pytest.approx(math.log(2), abs=1e-3)


def test_the_module_has_no_schedule():
    module = ready(SPRec)
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW), "an optimizer without a schedule"
    assert isinstance(module.loss, Sigmoid)


def test_refusals():
    with pytest.raises(ValueError, match=r"sft_weight must be >= 0, got -0\.5"):
        SPRec(sft_weight=-0.5)
