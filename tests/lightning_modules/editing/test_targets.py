"""Target vectors: batched optimisation equals single optimisation, changes are bounded, the model is not modified."""

import copy

import pytest
import torch
from literal_targets import literal_target
from small_editing import decoder, tokenizer

from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.prompts import PromptEncoder, fill_prompt
from malleable.lightning_modules.editing.targets import Fact, TargetSettings, find_targets

FACTS = [Fact("The capital of {} is", "Peru", "Anna"), Fact("{} lives in the big", "The old dog", "house of Tom"), Fact("I saw {}", "Anna", "Lima")]
CONTEXTS = ["{}", "The dog was happy. {}", "You. {}"]
LAYER = 2


def search(model, facts=FACTS, contexts=CONTEXTS, **settings):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return find_targets(model, find_layout(model), LAYER, PromptEncoder(tokenizer("bos")), facts, contexts, TargetSettings(**settings))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma"])
@pytest.mark.parametrize("max_rows", [256, 4])
def test_batched_targets_equal_single_targets(family, max_rows):
    model = decoder(family)
    # Facts end at different steps: one that is done must not move on with the others.
    stop = 1.01 * float(search(model, steps=12, lr=0.1, stop=1e-9).loss.median())
    together = search(model, steps=20, lr=0.1, stop=stop, max_rows=max_rows)
    assert together.steps.unique().numel() > 1
    for number, fact in enumerate(FACTS):
        alone = search(model, [fact], steps=20, lr=0.1, stop=stop)
        assert alone.steps == together.steps[number]
        torch.testing.assert_close(together.change[number], alone.change[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.loss[number], alone.loss[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [1e-9, 3.0])
def test_targets_equal_literal_implementation(stop):
    model = decoder()
    settings = {"steps": 8, "lr": 0.05, "stop": stop, "decay": 0.5, "kl": 0.5, "clamp": 0.3}
    found = search(model, **settings)
    for number, fact in enumerate(FACTS):
        expected = literal_target(model, model.model.layers[LAYER], PromptEncoder(tokenizer("bos")), fact, CONTEXTS, TargetSettings(**settings))
        torch.testing.assert_close(found.start[number], expected.start)
        torch.testing.assert_close(found.change[number], expected.change, rtol=1e-4, atol=1e-5)
        assert float(found.loss[number]) == pytest.approx(expected.loss, rel=1e-4)
        assert int(found.steps[number]) == expected.steps


def test_change_is_clamped_and_reduces_nll():
    model = decoder()
    short, long = search(model, steps=2, lr=5.0, clamp=0.2), search(model, steps=25, lr=0.3, clamp=2.0, decay=0.0)
    assert ((short.change.norm(dim=1) / short.start.norm(dim=1)) <= 0.2 * (1 + 1e-5)).all()
    assert (long.nll < search(model, steps=1).nll).all()


def test_inserted_target_gives_the_answer():
    model = decoder()
    fact = FACTS[2]
    found = search(model, [fact], ["{}"], steps=60, lr=0.3, clamp=20.0, decay=0.0, kl=0.0)
    encoder = PromptEncoder(tokenizer("bos"))
    row = encoder.encode_prompt(fact.prompt, fact.subject)

    def replace(_, __, output):
        output = output.clone()
        output[0, row.position] = found.value[0]
        return output

    handle = model.model.layers[LAYER].register_forward_hook(replace)
    best = int(model(torch.tensor([row.ids])).logits[0, -1].argmax())
    handle.remove()
    assert best == encoder.encode_answer(fact.target)[0]


def test_model_is_not_modified():
    model = decoder("gpt2")
    before = copy.deepcopy(model.state_dict())
    search(model, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_diverged_target_is_reported():
    model = decoder()
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="I saw Anna' -> 'Lima'"):
        search(model)


@pytest.mark.parametrize("changed", [{"lr": 0.0}, {"steps": 0}, {"clamp": -1.0}])
def test_settings_out_of_range(changed):
    with pytest.raises(ValueError, match=f"targets.{next(iter(changed))}"):
        TargetSettings(**changed)


def test_subject_with_braces():
    assert fill_prompt("{} is a", "{x}")[0] == "{x} is a"
    assert search(decoder(), [Fact("I saw {}", "{x} {}", "Anna")], steps=1).steps.tolist() == [0]
