"""What every exported module promises, whatever its method.

A new module needs one line in ``CASES`` of ``tests/helpers/module_cases.py``: how it is made, and which rows it learns from.
"""

import inspect
import json

import pytest
import torch
from lightning.pytorch import LightningModule
from module_cases import CASES, LANGUAGE_MODELS, loss_of, make, make_bare
from tiny_data import quiet_trainer
from tiny_module import lora, save_base
from torch.utils.data import DataLoader

import malleable.lightning_modules as exported
from malleable.lightning_modules.base import BaseModule, LossOutput


def test_every_exported_module_has_a_case():
    kinds = {name: getattr(exported, name) for name in exported.__all__}
    modules = {name for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, LightningModule) and not inspect.isabstract(kind)}
    assert modules == set(CASES), (
        f"give each exported module a line in CASES of tests/helpers/module_cases.py; missing or superfluous: {sorted(modules ^ set(CASES))}"
    )


@pytest.mark.parametrize("name", CASES)
class TestContract:
    def test_is_a_base_module(self, name):
        """It derives from `BaseModule`, and has no weights before `configure_model`."""
        assert issubclass(getattr(exported, name), BaseModule)
        assert sum(parameter.numel() for parameter in make(name).parameters()) <= 1

    def test_fast_dev_run(self, name, tmp_path, capsys):
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

    def test_a_checkpoint_restores_the_output(self, name, tmp_path):
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

    def test_a_plain_trainer_with_plain_loaders(self, name, tmp_path):
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
