"""Supervised tuning learns what follows from what."""

import pytest
import torch
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer

from malleable.datamodules.batch import PackedBatch
from malleable.lightning_modules.language.config import LanguageModelConfig, Scratch
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sft import SFT

DECODING = Decoding(num_beams=8, exclude_seen=False)


class PackedData(TinyData):
    """Whole histories in packed rows: three documents of four films that follow each other."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = []
        for index in range(48):
            documents = [[2, *(token for step in range(4) for token in TOKENS[(index + start + step) % 8])] for start in (0, 3, 6)]
            tokens = [token for document in documents for token in document]
            numbers = [number for number, document in enumerate(documents, 1) for _ in document]
            self.train_dataset.append({"sample_id": index, "input_ids": tokens, "document_ids": numbers})

    def row_tokens(self):
        return [len(row["input_ids"]) - 3 for row in self.train_dataset]


@pytest.mark.parametrize("data", [TinyData, PackedData])
def test_training_learns_the_next_title(tmp_path, data):
    """i -> i + 1 over eight films: one in eight is right by chance, nearly all after some epochs, from rows as from packed histories."""
    torch.manual_seed(0)
    config = LanguageModelConfig(scratch=Scratch(hidden_size=48, num_layers=1, num_heads=2, max_length=64))
    module = SFT(language_model=config, decoding=DECODING, ks=(1, 3), tuning=Tuning(lr=5e-3, warmup_steps=5))
    trainer = quiet_trainer(tmp_path, max_epochs=10, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data())
    (result,) = trainer.test(module, data(), verbose=False)
    assert result["test_hr_1"] >= 0.9
    assert result["test_loss"] < 0.4


def test_likelihood_is_that_of_the_batch():
    """One loss for both shapes of batch, in nats a token: ln 16 for uniform weights."""
    torch.manual_seed(0)
    module = SFT(language_model=tiny_config(), catalog=tiny_catalog())
    module.configure_model()
    torch.nn.init.zeros_(module.model.lm_head.weight)
    packed = batch_of([{"sample_id": 0, "input_ids": [2, 4, 5, 1], "document_ids": [1, 1, 1, 1]}])
    assert isinstance(packed, PackedBatch)
    for batch in (batch_of(tiny_rows(3)), packed):
        assert module.compute_loss(batch).loss.item() == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-6)
