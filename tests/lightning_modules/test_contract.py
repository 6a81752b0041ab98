"""What every exported module promises, whatever its method.

A new module needs one line in ``CASES``: how it is made, and which rows it learns from.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import TOKENS, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_graph import TinyGraphData, collate_queries, query_rows, tiny_graph, tiny_triples
from tiny_module import lora, save_base
from torch import Tensor
from torch.utils.data import DataLoader

import malleable.lightning_modules as exported
from malleable.datamodules.batch import Vocabulary, collate
from malleable.lightning_modules.base import BaseModule, LossOutput
from malleable.lightning_modules.language_model import LanguageModel
from malleable.lightning_modules.tuning import Tuning


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
    return module.eval().predict_step(collate(text_rows(6)), 0).detach()


def ranked(module: Any) -> Tensor:
    """Scores of all entities for some queries."""
    return torch.cat([part.float() for part in module.eval().predict_step(collate_queries(graph_rows()[:6]))])


def recommended(module: Any) -> Tensor:
    """What the module makes of test rows: the tensor that a checkpoint must bring back."""
    return torch.cat([part.float() for part in module.eval().recommend(collate(tiny_rows(6)))])


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
    collate: Callable[[Any], Any] = collate
    test_rows: Callable[[int], list[Any]] = tiny_rows


LANGUAGE_MODEL = {"language_model": tiny_config(), "tuning": Tuning(lr=1e-2, warmup_steps=0), "ks": (1, 3)}
GRAPH: dict[str, Any] = {"needs": {"graph": tiny_graph()}, "data": TinyGraphData, "collate": collate_queries}
GRAPH |= {"rows": graph_rows, "output": ranked, "test_rows": lambda count: graph_rows()[:count]}
CASES = {
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
    "DPO": Case(LANGUAGE_MODEL, preference_rows),
    "ItemKNN": Case({"ks": (1, 3)}),
    "Markov": Case({"ks": (1, 3)}),
    "NFE": Case({"dimension": 4, "gamma_trainable": True}, **GRAPH),
    "Popularity": Case({"ks": (1, 3)}),
    "RotatE": Case({"dimension": 4}, **GRAPH),
    "SFT": Case(LANGUAGE_MODEL),
    "SPRec": Case(LANGUAGE_MODEL, preference_rows),
    "TransE": Case({"dimension": 4}, **GRAPH),
}
LANGUAGE_MODELS = [name for name in CASES if issubclass(getattr(exported, name), LanguageModel)]


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(exported, name)(**{**CASES[name].needs, **CASES[name].settings, **settings})


def make_bare(name: str) -> Any:
    """Make a module that must be told by its data what it needs."""
    return make(name, **dict.fromkeys(CASES[name].needs))


def loss_of(module: Any, name: str) -> LossOutput:
    module.configure_model()
    return module.train().compute_loss(CASES[name].collate(CASES[name].rows()[:4]))


def test_every_exported_module_has_a_case():
    kinds = {name: getattr(exported, name) for name in exported.__all__}
    modules = {name for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, LightningModule) and kind is not BaseModule}
    assert modules == set(CASES), f"give each exported module a line in CASES of {__file__}; missing or superfluous: {sorted(modules ^ set(CASES))}"


@pytest.mark.parametrize("name", CASES)
class TestContract:
    def test_is_one_of_ours(self, name):
        """It derives from `BaseModule`, and has no weights before `configure_model`."""
        assert issubclass(getattr(exported, name), BaseModule)
        assert sum(parameter.numel() for parameter in make(name).parameters()) <= 1

    def test_a_trial_run(self, name, tmp_path, capsys):
        """`fit` and `test` under `fast_dev_run`, which writes nothing; what there is to say goes through loggers."""
        module = make_bare(name)
        trainer = quiet_trainer(tmp_path / "run", fast_dev_run=True)
        trainer.fit(module, CASES[name].data(train=CASES[name].rows()))
        (figures,) = trainer.test(module, CASES[name].data(), verbose=False)
        assert figures
        assert all(torch.tensor(value).isfinite() for value in figures.values())
        assert not list(tmp_path.rglob("*.*"))
        assert capsys.readouterr().out == ""

    def test_the_loss_is_a_finite_scalar(self, name):
        output = loss_of(make(name), name)
        assert isinstance(output, LossOutput)
        assert output.loss.shape == ()
        assert output.loss.isfinite()
        assert all(value.shape == () and value.isfinite() and not value.requires_grad for value in output.extras.values())
        assert output.weight is None or output.weight > 0

    def test_gradient_reaches_what_is_trainable(self, name):
        module = make(name)
        loss_of(module, name).loss.backward()
        reached = {key for key, value in module.named_parameters() if value.grad is not None}
        assert reached == {key for key, value in module.named_parameters() if value.requires_grad}
        assert reached

    def test_the_same_seed_gives_the_same_loss(self, name):
        losses = [loss_of(make(name), name).loss.item() for _ in range(2)]
        assert losses[0] == losses[1]

    def test_a_checkpoint_brings_back_the_output(self, name, tmp_path):
        """Without pickle, without arguments: the file is enough. Hyper-parameters are plain data."""
        module, case = make(name), CASES[name]
        trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
        trainer.fit(module, case.data(train=case.rows()))
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        json.dumps(stored["hyper_parameters"])
        expected = case.output(module)
        loaded = getattr(exported, name).load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
        assert torch.equal(case.output(loaded), expected)
        fresh = make_bare(name)
        quiet_trainer(tmp_path).test(fresh, case.data(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True, verbose=False)
        assert torch.equal(case.output(fresh), expected)

    def test_a_bare_trainer_and_loaders_of_ones_own(self, name, tmp_path):
        """No data module, no command line, no callback of ours: what is needed is passed."""
        case, module = CASES[name], make(name)
        train, test = (DataLoader(rows, batch_size=4, collate_fn=case.collate) for rows in (case.rows(), case.test_rows(6)))
        trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, logger=False)
        trainer.fit(module, train, test)
        assert trainer.global_step == 4
        (figures,) = trainer.test(module, test, verbose=False)
        assert all(torch.tensor(value).isfinite() for value in figures.values())
        assert len(trainer.predict(module, test)) == 2


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_gradient_reaches_adapters_and_nothing_else(name, tmp_path):
    module = make(name, language_model=lora(save_base(tmp_path / "base")))
    loss_of(module, name).loss.backward()
    reached = {key for key, value in module.named_parameters() if value.grad is not None}
    assert reached == {key for key, value in module.named_parameters() if value.requires_grad}
    assert all("lora_" in key for key in reached)
    assert any(value.grad.abs().sum() > 0 for key, value in module.named_parameters() if key in reached)
