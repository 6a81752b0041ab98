"""Language-model methods on a device: the CPU's figures, every precision, resumption, no wait within a step."""

import math
import warnings

import pytest
import torch
from synchronisations import refuses_to_wait
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, save_base

from malleable import DPO, SFT, CausalLM, ReferenceCache, SPRec
from malleable.datamodules.batch import Vocabulary
from malleable.lightning_modules.functional.language import chunked_head
from malleable.lightning_modules.language.tuning import Tuning

pytestmark = pytest.mark.gpu

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "bfloat16 base, float32 adapters"]


def pairs(count: int = 8):
    """Rows with the title behind the true one as the rejected answer."""
    rows = []
    for row in tiny_rows(count):
        other = (row["item_ids"][0] + 1) % 8
        rows.append(row | {"answers": [*row["answers"], TOKENS[other]], "item_ids": [*row["item_ids"], other]})
    return rows


def known_pairs(count: int = 8):
    return [row | {"reference_logps": [-5.0, -6.0]} for row in pairs(count)]


def packed(count: int = 4):
    row = {"input_ids": [2, *TOKENS[0], *TOKENS[3], 2, *TOKENS[4]], "document_ids": [1] * 8 + [2] * 4}
    return [row | {"sample_id": number, "input_ids": [*row["input_ids"][:11], 4 + number]} for number in range(count)]


CASES = {
    "SFT": (lambda config: SFT(config, tiny_catalog()), tiny_rows),
    "SFT on packed rows": (lambda config: SFT(config, tiny_catalog()), packed),
    "DPO": (lambda config: DPO(config, tiny_catalog(), sft_weight=0.5), known_pairs),
    "SPRec": (lambda config: SPRec(config, tiny_catalog()), known_pairs),
    "CausalLM": (lambda config: CausalLM(config, Vocabulary(16, 1)), packed),
}


def loss_and_gradients(name, device):
    make, rows = CASES[name]
    torch.manual_seed(0)
    module = make(tiny_config())
    module.configure_model()
    module.to(device).train()
    loss = module.compute_loss(batch_of(rows()).to(device)).loss
    loss.backward()
    return loss.detach().cpu(), {key: parameter.grad.cpu() for key, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_those_of_a_cpu(name, device):
    expected, expected_gradients = loss_and_gradients(name, torch.device("cpu"))
    loss, gradients = loss_and_gradients(name, device)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_a_chunked_head_equals_that_of_a_cpu(name, device, monkeypatch):
    expected, expected_gradients = loss_and_gradients(name, torch.device("cpu"))
    chunk_head(monkeypatch)
    loss, gradients = loss_and_gradients(name, device)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def chunk_head(monkeypatch):
    """Compute the language-model head in chunks of three positions of a vocabulary of 16."""
    for name, value in {"LIMIT": 0, "ACCELERATOR_LIMIT": 0, "CHUNK": 48, "ACCELERATOR_CHUNK": 48}.items():
        monkeypatch.setattr(chunked_head, name, value)


def test_adapters_of_a_4_bit_model_with_a_chunked_head_and_checkpointing(device, tmp_path, monkeypatch):
    """Losses and gradients equal those of all logits at once; the head is 4-bit, too, if it has adapters."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    if device.type != "cuda":
        pytest.skip("4-bit weights need CUDA")
    base, found = save_base(tmp_path / "base"), []
    for chunked in (False, True):
        if chunked:
            chunk_head(monkeypatch)
        torch.manual_seed(0)
        module = DPO(lora(base, dropout=0.0, quantization="4bit", dtype="bfloat16", gradient_checkpointing=True), tiny_catalog())
        module.configure_model()
        module.to(device).train()
        loss = module.compute_loss(batch_of(known_pairs()).to(device)).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)])
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait_for_the_device(name, device):
    make, rows = CASES[name]
    module = make(tiny_config())
    module.configure_model()
    module.to(device).train()
    batch = batch_of(rows()).to(device)
    module.compute_loss(batch).loss.backward()  # what is set up once may wait
    with refuses_to_wait(device):
        module.compute_loss(batch).loss.backward()


class PackedData(TinyData):
    """Packed rows in place of answers."""

    def __init__(self):
        super().__init__(train=packed(8))

    def setup(self, stage):
        super().setup(stage)
        self.vocabulary = Vocabulary(16, 1)
        self.val_dataset = self.test_dataset = packed(4)

    def row_tokens(self):
        return [10] * 8


def trainer_on(device, folder, **options):
    return quiet_trainer(folder, accelerator="gpu" if device.type == "cuda" else "cpu", **options)


@pytest.mark.parametrize("kind", [SFT, DPO, SPRec, CausalLM])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_and_test_in_every_precision(kind, precision, device, tmp_path):
    adapters = precision == PRECISIONS[-1]
    config = lora(save_base(tmp_path / "base"), dropout=0.0, dtype="bfloat16") if adapters else tiny_config()
    module = kind(config, tuning=Tuning(lr=1e-2, warmup_steps=0), **({} if kind is CausalLM else {"ks": (1, 3)}))
    data = PackedData() if kind is CausalLM else TinyData(train=pairs() if kind is DPO else tiny_rows(8))
    trainer = trainer_on(
        device,
        tmp_path,
        max_epochs=2,
        precision="bf16-mixed" if adapters else precision,
        callbacks=[ReferenceCache()] if kind is DPO else [],
        gradient_clip_val=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
        assert trainer.callback_metrics["train_loss"].dtype == torch.float32
        (figures,) = trainer.test(module, data, verbose=False)
    assert all(math.isfinite(value) for value in figures.values()), figures
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert {parameter.device.type for parameter in trained} <= {device.type, "cpu"}
    if adapters:
        assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("kind", [SFT, DPO])
def test_a_resumed_run_equals_one_that_went_on(kind, device, tmp_path):
    """As after a kill: a new process would load the same checkpoint into a new module."""

    def fit(folder, epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = kind(tiny_config(), tuning=Tuning(lr=1e-2, warmup_steps=0, decay="constant"))
        data = TinyData(train=pairs() if kind is DPO else tiny_rows(8))
        reference = ReferenceCache(dirpath=str(tmp_path / "reference"))
        trainer = trainer_on(device, folder, max_epochs=epochs, callbacks=[reference] if kind is DPO else [])
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer.checkpoint_callback.best_model_path, {key: value.cpu() for key, value in module.model.state_dict().items()}

    _, expected = fit(tmp_path / "whole", 3)
    path, _ = fit(tmp_path / "first", 1)
    _, found = fit(tmp_path / "second", 3, path)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
