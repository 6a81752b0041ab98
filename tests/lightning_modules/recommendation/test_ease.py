"""EASE: scores of whole histories, rows that are not whole histories, settings."""

import pytest
import torch
from tiny_data import quiet_trainer
from toy_shop import TITLES, ToyShop

from malleable import EASE
from malleable.datamodules.collate import collate_answers
from malleable.lightning_modules.recommendation.baselines import count_rows


def counted(**settings):
    data = ToyShop()
    data.setup("fit")
    module = EASE(data.catalog, **settings)
    count_rows([module], data.train_dataset)
    return module, data


def test_weights_are_those_of_the_users_items():
    """Of the training part of each history: all items except the last one."""
    module, data = counted(l2=2.0)
    x = torch.zeros(len(data.users), len(TITLES), dtype=torch.float64)
    for row, items in zip(x, data.users, strict=True):
        row[items[:-1]] = 1
    inverse = torch.linalg.inv(x.T @ x + 2.0 * torch.eye(len(TITLES)))
    expected = -inverse / inverse.diagonal()
    expected.fill_diagonal_(0)
    torch.testing.assert_close(module.similarity, expected.float(), rtol=1e-5, atol=1e-5)
    batch = collate_answers(data.test_dataset)
    scores = module.scores(batch)
    for row, history in zip(scores, batch.history.tolist(), strict=True):
        torch.testing.assert_close(row, expected[[item for item in history if item >= 0]].sum(0).float(), rtol=1e-5, atol=1e-5)


def test_counts_that_are_no_table_of_common_users_get_a_larger_penalty(caplog):
    module, _ = counted(l2=0.01)
    module.pairs += 5
    module._similarity = None
    assert module.similarity.isfinite().all()
    assert "EASE: the training rows are not whole histories without repeated items; l2 is" in caplog.text


def test_a_checkpoint_has_the_counts(tmp_path):
    module, data = EASE(ks=(1, 3), l2=3.0), ToyShop()
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = EASE.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.l2 == 3.0
    batch = collate_answers(data.test_dataset)
    assert torch.equal(loaded.scores(batch), module.scores(batch))


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_a_penalty_that_is_not_positive_is_refused(l2):
    with pytest.raises(ValueError, match="l2 must be > 0, got"):
        EASE(l2=l2)
