"""A compiled decoder is one graph without breaks, is compiled a few times only, and trains like an uncompiled one."""

import copy
import os
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import batch_of
from tiny_data import TinyData, quiet_trainer
from torch._dynamo.utils import counters

from malleable import DPO, SFT, CausalLM
from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.lightning_modules.language.compiled import Compile, compile_decoder, compiled_passes
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, Scratch

CATALOG = Catalog(titles=("A", "B"), token_ids=((5, 1), (6, 1)), popularity=(1, 1), vocabulary=Vocabulary(40, eos_token_id=1))
SIZES = Scratch(hidden_size=16, num_layers=1, num_heads=2)


def answers(width):
    return [{"sample_id": n, "prompt": [3] * (width - n), "answers": [[5] * n + [1]], "item_ids": [0]} for n in range(3)]


def pairs(width):
    return [{**row, "answers": [*row["answers"], [6, 6, 1]], "item_ids": [0, 1], "reference_logps": [-3.0, -4.0]} for row in answers(width)]


def documents(width):
    return [{"sample_id": n, "input_ids": [3] * width, "document_ids": [1] * 4 + [2] * (width - 4)} for n in range(3)]


MODULES = {
    "SFT": (lambda c: SFT(c, CATALOG), answers),
    "DPO": (lambda c: DPO(c, CATALOG), pairs),
    "CausalLM": (lambda c: CausalLM(c, Vocabulary(40, 1)), documents),
}


@pytest.fixture
def graphs():
    """Graphs that Dynamo gave the compiler ``counting``."""
    found = []

    def counting(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.register_backend(counting, name="counting")
    yield found
    torch._dynamo.reset()
    del torch._dynamo.backends.registry._COMPILER_FNS["counting"]


def built(name, config):
    module = MODULES[name][0](config)
    module.configure_model()
    return module.train()


def step(module, rows):
    module.zero_grad()
    with compiled_passes():
        loss = module.compute_loss(batch_of(rows)).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)]


def check_equal(compiled, plain, rows):
    for ours, expected in zip(step(compiled, rows), step(plain, rows), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["SFT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DPO", "CausalLM"))])
def test_one_graph_for_all_widths(name, graphs):
    compiled = built(name, LanguageModelConfig(scratch=SIZES, compile=Compile(backend="counting")))
    plain = copy.deepcopy(compiled)
    assert plain.model.base_model._compiled_call_impl is None
    for width in (9, 17, 30):
        check_equal(compiled, plain, MODULES[name][1](width))
    assert len(graphs) == 2  # for the first width, and for all
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lora": LoRA(r=2, dropout=0.0)}, {"gradient_checkpointing": True}], ids=["LoRA", "gradient checkpointing"])
def test_one_graph_under_other_settings(options, graphs):
    compiled = built("SFT", LanguageModelConfig(scratch=SIZES, compile=Compile(backend="counting"), **options))
    plain = copy.deepcopy(compiled)
    for width in (9, 17, 30):
        check_equal(compiled, plain, answers(width))
    assert len(graphs) == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_default_compiler_gives_equal_losses_and_gradients(name):
    torch._dynamo.reset()
    compiled = built(name, LanguageModelConfig(scratch=SIZES, compile=Compile()))
    with mock.patch.dict(os.environ):  # Inductor sets variables.
        check_equal(compiled, copy.deepcopy(compiled), MODULES[name][1](9))


def test_names_stay_and_other_passes_run_without_compilation(graphs):
    module = built("SFT", LanguageModelConfig(scratch=SIZES, compile=Compile(backend="counting")))
    names = list(built("SFT", LanguageModelConfig(scratch=SIZES)).state_dict())
    assert list(module.state_dict()) == names
    module.recommend(batch_of(answers(9)), k=2)
    with compiled_passes():
        module.model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)
    assert not graphs


def test_settings_are_restored_from_plain_data():
    module = SFT({"compile": {"backend": "eager", "dynamic": True}}, CATALOG)
    assert module.language_model.compile == Compile("eager", dynamic=True)
    assert SFT(module.hparams["language_model"]).language_model == module.language_model


def test_a_second_call_compiles_nothing():
    module = built("SFT", LanguageModelConfig(scratch=SIZES, compile=Compile(backend="eager")))
    call = module.model.base_model._compiled_call_impl
    compile_decoder(module.model, partial(torch.compile, backend="eager"))
    assert module.model.base_model._compiled_call_impl is call


def test_sharded_weights_are_refused(monkeypatch):
    module = SFT(LanguageModelConfig(scratch=SIZES, compile=Compile(backend="eager")), CATALOG)
    monkeypatch.setattr(type(module), "attached", SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=True)))
    module.model = SimpleNamespace()
    with pytest.raises(MisconfigurationException, match="does not support weights that are sharded"):
        module._compile()


def test_fit_of_a_compiled_module(graphs, tmp_path):
    module = SFT(LanguageModelConfig(scratch=SIZES))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(torch.compile(module, backend="counting"), TinyData())
    assert trainer.global_step == 1
    assert graphs
    assert "train_loss" in trainer.callback_metrics


def test_fit_of_another_compiled_module(tmp_path):
    """Modules without a decoder train as they are."""
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=1)
    trainer.fit(torch.compile(BoringModule(), backend="eager"), BoringDataModule())
    assert trainer.global_step == 2
    assert "train_loss" in trainer.callback_metrics
