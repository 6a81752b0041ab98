"""SASRec of RecBole on the rows of our data module: its own data loader, model and loss, with our split, ranking and metrics.

RecBole 1.2.1 was written for numpy 1: names that numpy 2 has removed are added before it is imported.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from malleable import RecommendationDataModule
from malleable.lightning_modules.functional.recommendation.baselines import top_items
from malleable.lightning_modules.metrics.ranking import RankingMetrics
from malleable.lightning_modules.recommendation.evaluation import allowed_items

REMOVED = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "bool8": np.bool_, "object0": np.object_, "string_": np.bytes_}


class RecBoleSASRec:
    """RecBole's SASRec with cross-entropy over all items.

    RecBole makes a training row from each item of a history and the items before it. The rows of a data module are written as its benchmark files, so
    that both libraries train on the same targets.

    Args:
        data: Our data module, after ``setup``.
        length: Maximum number of items before a target.
        dim: Width of states, embeddings and feed-forward layers.
        layers: Number of layers.
        heads: Number of attention heads.
        dropout: Dropout probability of states and of attention weights.
        batch_size: Number of training rows of a step.
        lr: Learning rate of Adam.
        seed: Seed of weights and order.
        device: Device of model and rows.
    """

    def __init__(
        self,
        data: RecommendationDataModule,
        *,
        length: int,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        for name, value in REMOVED.items():
            if name not in vars(np):
                setattr(np, name, value)
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.data.interaction import Interaction
        from recbole.model.sequential_recommender import SASRec
        from recbole.utils import init_seed

        logging.getLogger().setLevel(logging.WARNING)
        self.data, self.length, self.device, self._interaction = data, length, device, Interaction
        settings = {
            "benchmark_filename": ["train", "valid", "test"],
            "alias_of_item_id": ["item_id_list"],
            "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
            "MAX_ITEM_LIST_LENGTH": length,
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "hidden_size": dim,
            "inner_size": dim,
            "n_layers": layers,
            "n_heads": heads,
            "hidden_dropout_prob": dropout,
            "attn_dropout_prob": dropout,
            "train_batch_size": batch_size,
            "use_gpu": False,
            "show_progress": False,
            "reproducibility": False,
            "seed": seed,
        }
        with tempfile.TemporaryDirectory() as folder:
            _write(data, Path(folder) / "rows", length)
            config = Config(model="SASRec", dataset="rows", config_dict=settings | {"data_path": folder, "checkpoint_dir": folder})
            init_seed(seed, reproducibility=False)
            dataset = create_dataset(config)
            self.loader, _, _ = data_preparation(config, dataset)
        self.model = SASRec(config, self.loader.dataset).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        tokens = self.loader.dataset.field2id_token["item_id"][1:]
        self._items = torch.tensor([int(token) for token in tokens])
        self._number = torch.zeros(len(data.catalog), dtype=torch.long).index_put_((self._items,), torch.arange(1, len(tokens) + 1))

    @property
    def num_steps(self) -> int:
        """Number of steps of an epoch."""
        return len(self.loader)

    def steps(self) -> Iterator[None]:
        """Train for one epoch; yield after each step."""
        self.model.train()
        for rows in self.loader:
            self.optimizer.zero_grad()
            self.model.calculate_loss(rows.to(self.device)).backward()
            self.optimizer.step()
            yield

    @torch.no_grad()
    def scores(self, history: Tensor) -> Tensor:
        """Score all items of the catalogue for histories ``(B, L)``, padded with -1 on the left; ``-inf`` for items that RecBole has not seen."""
        recent = history[:, -self.length :]
        lengths = (recent >= 0).sum(1)
        rows = torch.zeros(len(recent), self.length, dtype=torch.long)
        for row, items, size in zip(rows, recent, lengths.tolist(), strict=True):
            row[:size] = self._number[items[len(items) - size :]]
        self.model.eval()
        inputs = self._interaction({"item_id_list": rows, "item_length": lengths.clamp_min(1)}).to(self.device)
        found = self.model.full_sort_predict(inputs).cpu()
        return torch.full((len(rows), len(self.data.catalog)), -torch.inf).index_copy_(1, self._items, found[:, 1:])

    def evaluate(self, loader: Any) -> dict[str, float]:
        """Rank all unseen items for the rows of a loader of the data module, and return our metrics."""
        metric = RankingMetrics((10,))
        for batch in loader:
            batch = batch.replace(candidates=None)
            scores = self.scores(batch.history)
            items, _ = top_items(scores, 10, allowed_items(batch, scores.shape[1]))
            metric.update(items, batch.target, batch.sample_id)
        return {name: float(value) for name, value in metric.compute().items()}


def _write(data: RecommendationDataModule, folder: Path, length: int) -> None:
    """Write the rows of a data module as RecBole's benchmark files; validation and test rows are not used by RecBole, so that one is enough."""
    folder.mkdir()
    rows = data.answer_dataset
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    lines = []
    for index in range(len(rows)):
        row = rows[index]
        lines.append(f"{index}\t{' '.join(map(str, row['earlier'][-length:]))}\t{row['item_ids'][0]}\n")
    for name, part in (("train", lines), ("valid", lines[:1]), ("test", lines[:1])):
        (folder / f"rows.{name}.inter").write_text(header + "".join(part), encoding="utf-8")
