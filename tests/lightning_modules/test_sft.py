"""Supervised tuning learns what follows from what."""

import pytest
import torch
from tiny import tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer

from malleable.datamodules.batch import PackedBatch, collate
from malleable.lightning_modules.language_model import Decoding, Tuning
from malleable.lightning_modules.sft import SFT

DECODING = Decoding(num_beams=8, exclude_seen=False)


class PackedData(TinyData):
    """The training rows as whole histories in packed rows: films in their order, three documents a row."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokens = tiny_catalog().token_ids
        self.train_dataset = []
        for index in range(48):
            documents = [[2, *(token for step in range(3) for token in tokens[(index + start + step) % 8])] for start in (0, 3, 6)]
            numbers = [number for number, document in enumerate(documents, 1) for _ in document]
            self.train_dataset.append(
                {"sample_id": index, "input_ids": [token for document in documents for token in document], "document_ids": numbers}
            )

    def row_tokens(self):
        return [len(row["input_ids"]) - 3 for row in self.train_dataset]


@pytest.mark.parametrize("data", [TinyData, PackedData])
def test_learns_what_follows_from_what(tmp_path, data):
    """i -> i + 1 over eight films: one in eight is right by chance, nearly all after some epochs, from rows as from packed histories."""
    torch.manual_seed(0)
    module = SFT(language_model=tiny_config(), decoding=DECODING, ks=(1, 3), tuning=Tuning(lr=3e-2, warmup_steps=5))
    trainer = quiet_trainer(tmp_path, max_epochs=8, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data())
    (result,) = trainer.test(module, data(), verbose=False)
    assert result["test_hr_1"] >= 0.9
    assert result["test_loss"] < 0.5


def test_likelihood_is_that_of_the_batch():
    """One loss for both shapes of batch, in nats a token: ln 16 for uniform weights."""
    torch.manual_seed(0)
    module = SFT(language_model=tiny_config(), catalog=tiny_catalog())
    module.configure_model()
    torch.nn.init.zeros_(module.model.lm_head.weight)
    packed = collate([{"sample_id": 0, "input_ids": [2, 4, 5, 1], "document_ids": [1, 1, 1, 1]}])
    assert isinstance(packed, PackedBatch)
    for batch in (collate(tiny_rows(3)), packed):
        assert module.compute_loss(batch).loss.item() == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-6)
