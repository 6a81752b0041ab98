"""One case for each exported module: how it is made, and which rows it learns from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData
from tiny_graph import TinyGraphData, collate_queries, query_rows, tiny_graph, tiny_triples
from torch import Tensor
from toy_sequences import ToySequences, sequence_catalog
from toy_sequences import query_rows as sequence_queries
from toy_sequences import training_rows as sequence_rows

import malleable.lightning_modules as exported
from malleable.datamodules.batch import SequenceBatch, Vocabulary
from malleable.datamodules.collate import collate
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sequence_settings import EncoderSettings


def answer_rows() -> list[Any]:
    """A prompt and its true answer."""
    return tiny_rows(16)


def preference_rows() -> list[Any]:
    """A true and a rejected answer with their reference."""
    rows = tiny_rows(16)
    return [row | {"answers": [row["answers"][0], TOKENS[(row["item_ids"][0] + 2) % 8]], "reference_logps": [-6.0, -6.0]} for row in rows]


def graph_rows() -> list[Any]:
    """Queries of a graph."""
    return query_rows(tiny_triples()[:8])


def text_rows(count: int = 16) -> list[Any]:
    """Two documents in a row."""
    return [{"sample_id": number, "input_ids": [2, 4 + number % 8, 5, 1, 2, 6, 1], "document_ids": [1, 1, 1, 1, 2, 2, 2]} for number in range(count)]


class TextData(TinyData):
    """Rows of text."""

    vocabulary = Vocabulary(16, 1, 0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = self._train or text_rows()
        self.val_dataset, self.test_dataset, self.predict_dataset = text_rows(6), text_rows(13), text_rows(5)

    def row_tokens(self):
        return [len(row["input_ids"]) - 2 for row in self.train_dataset]


def likely(module: Any) -> Tensor:
    """Log-likelihoods of rows of text."""
    return module.eval().predict_step(batch_of(text_rows(6)), 0).detach()


def ranked(module: Any) -> Tensor:
    """Scores of all entities for some queries."""
    return torch.cat([part.float() for part in module.eval().predict_step(collate_queries(graph_rows()[:6]))])


def recommended(module: Any) -> Tensor:
    """What the module makes of test rows: the tensor that a checkpoint must bring back."""
    return torch.cat([part.float() for part in module.eval().recommend(batch_of(tiny_rows(6)))])


@dataclass(frozen=True)
class Case:
    """How a module is made and used.

    Attributes:
        settings: Arguments of the constructor besides what the module needs.
        rows: Training rows.
        output: What a trained module gives.
        needs: What the module takes from its data.
        data: Makes a data module, with other training rows if given.
        collate: Makes a batch of rows.
        test_rows: Rows to test on.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[], list[Any]] = answer_rows
    output: Callable[[Any], Tensor] = recommended
    needs: dict[str, Any] = field(default_factory=lambda: {"catalog": tiny_catalog()})
    data: Callable[..., Any] = TinyData
    collate: Callable[[Any], Any] = batch_of
    test_rows: Callable[[int], list[Any]] = tiny_rows


LANGUAGE_MODEL = {"language_model": tiny_config(), "tuning": Tuning(lr=1e-2, warmup_steps=0), "ks": (1, 3)}
GRAPH: dict[str, Any] = {"needs": {"graph": tiny_graph()}, "data": TinyGraphData, "collate": collate_queries}
GRAPH |= {"rows": graph_rows, "output": ranked, "test_rows": lambda count: graph_rows()[:count]}
CASES = {
    "EASE": Case({"ks": (1, 3), "l2": 1.0}),
    "CausalLM": Case(
        {"language_model": tiny_config(), "tuning": Tuning(lr=1e-2, warmup_steps=0)},
        text_rows,
        likely,
        {"vocabulary": Vocabulary(16, 1, 0)},
        TextData,
        test_rows=text_rows,
    ),
    "ComplEx": Case({"dimension": 4}, **GRAPH),
    "DistMult": Case({"dimension": 4}, **GRAPH),
    "AlphaDPO": Case(LANGUAGE_MODEL, preference_rows),
    "DPO": Case(LANGUAGE_MODEL, preference_rows),
    "ItemKNN": Case({"ks": (1, 3)}),
    "Markov": Case({"ks": (1, 3)}),
    "NFE": Case({"dimension": 4, "gamma_trainable": True}, **GRAPH),
    "Popularity": Case({"ks": (1, 3)}),
    "RotatE": Case({"dimension": 4}, **GRAPH),
    "SequentialRecommender": Case(
        {"encoder": EncoderSettings("hstu", dim=8, num_layers=1, max_length=12, dropout=0.0), "ks": (1, 3), "behaviors": ("view", "purchase")},
        lambda: sequence_rows(16),
        lambda module: torch.cat([part.float() for part in module.eval().recommend(collate(sequence_queries(6), SequenceBatch))]),
        {"catalog": sequence_catalog()},
        ToySequences,
        lambda rows: collate(rows, SequenceBatch),
        sequence_queries,
    ),
    "SFT": Case(LANGUAGE_MODEL),
    "SPRec": Case(LANGUAGE_MODEL, preference_rows),
    "TransE": Case({"dimension": 4}, **GRAPH),
}
LANGUAGE_MODELS = [name for name in CASES if issubclass(getattr(exported, name), LanguageModel)]


def make(name: str, **settings: Any) -> Any:
    """Make a module that has what it needs, without weights."""
    torch.manual_seed(0)
    return getattr(exported, name)(**{**CASES[name].needs, **CASES[name].settings, **settings})


def make_bare(name: str) -> Any:
    """Make a module that must be told by its data what it needs."""
    return make(name, **dict.fromkeys(CASES[name].needs))


def loss_of(module: Any, name: str) -> LossOutput:
    """Compute the loss of four training rows."""
    module.configure_model()
    return module.train().compute_loss(CASES[name].collate(CASES[name].rows()[:4]))
