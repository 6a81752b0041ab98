"""AlphaEditor on a decoder trained on facts: edited facts change, other facts and the state of the model do not."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_editing import decoder, tokenizer
from small_facts import NEW, OTHERS, SETTINGS, TEXTS, learnt_decoder, paraphrased, share

from malleable.lightning_modules.editing.editor import AlphaEditor
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.targets import Fact


@pytest.fixture(scope="module")
def learnt():
    return learnt_decoder()


@pytest.fixture
def model(learnt):
    return copy.deepcopy(learnt)


def editor(model, **changed):
    made = AlphaEditor(model, tokenizer("bos"), EditSettings(**SETTINGS | changed))
    made.fit_statistics(TEXTS)
    return made


def test_edits_generalise_to_paraphrases_and_preserve_other_facts(model):
    records = editor(model).edit(NEW)
    assert share(model, NEW) == share(model, paraphrased(NEW)) == 1
    assert share(model, OTHERS) >= 0.9
    assert [record.fact for record in records] == NEW
    for record in records:
        assert record.nll < 0.5
        assert record.residuals[0] == pytest.approx(1, abs=1e-4), "nothing has changed before the first layer"
        assert record.residuals[-1] < 0.5


def test_projection_preserves_other_facts(model, learnt):
    editor(model).edit(NEW)
    free = copy.deepcopy(learnt)
    editor(free, method="ridge").edit(NEW)
    assert share(free, NEW) == 1
    assert share(model, OTHERS) > share(free, OTHERS) + 0.4


@pytest.mark.parametrize("method", ["memit", "ridge", "fine_tune"])
def test_baselines_edit_the_same_facts(model, method):
    made = editor(model, method=method, moment_weight=0.1)
    made.settings.tuning.lr = 3e-3
    assert len(made.edit(NEW)) == 6
    assert share(model, NEW) == 1
    for layer in (0, 1):
        change = made.change(layer)
        torch.testing.assert_close(made.projections[layer].weight - made._originals[layer], change, rtol=1e-4, atol=1e-5)


def test_later_batches_preserve_earlier_ones(model):
    made = editor(model, batch_size=2)
    records = made.edit(NEW)
    assert [record.batch for record in records] == [0, 0, 1, 1, 2, 2]
    assert share(model, NEW) == 1
    assert made.past_keys[1].shape == (6, 256)
    (more,) = made.edit([OTHERS[0]._replace(target=NEW[0].target)])
    assert more.batch == 3
    assert made.past_keys[1].shape == (7, 256)
    assert share(model, NEW) == 1


def test_facts_of_another_editor_are_preserved(model, learnt):
    """Two editors, one after the other, do what one does in two batches; without their memory the second does something else."""
    one = editor(model, batch_size=3)
    one.edit(NEW)
    changes = []
    for preserved in (NEW[:3], []):
        other = copy.deepcopy(learnt)
        moments = editor(other, batch_size=3)
        moments.edit(NEW[:3])
        second = AlphaEditor(other, tokenizer("bos"), EditSettings(**SETTINGS | {"batch_size": 3}))
        second.moments, second.spectra = moments.moments, moments.spectra
        second.preserve(preserved)
        second.edit(NEW[3:])
        assert second.past_keys[0].shape[0] == len(preserved) + 3
        changes.append({layer: moments.change(layer) + second.change(layer) for layer in (0, 1)})
    for layer in (0, 1):
        whole = one.change(layer)
        assert (changes[0][layer] - whole).norm() < 1e-3 * whole.norm()
        assert (changes[1][layer] - whole).norm() > 1e-2 * whole.norm()


def test_updates_are_in_the_null_space_and_drift_is_bounded(model):
    made = editor(model)
    made.edit(NEW)
    for layer in (0, 1):
        update, spectrum = made.update(layer).dense().double(), made.spectra[layer]
        retained = made.settings.threshold.retained(spectrum.values)
        used = spectrum.vectors[:, retained:]
        assert (update @ used).abs().max() < 1e-5 * update.abs().max()
        bound = float(spectrum.values[retained - 1]) * float(update.square().sum())
        assert 0 < made.drift()[layer] <= bound * (1 + 1e-6)


def test_empty_context_has_half_of_the_weight_of_a_key(model):
    made = editor(model)
    made.contexts = ["{}", "The dog. {}", "You know that. {}", "I. {}"]
    keys, values = made._keys_and_values(NEW[:2], [0, 1])
    encoder = made.encoder
    for number, fact in enumerate(NEW[:2]):
        alone = []
        for context in made.contexts:
            row = encoder.encode_prompt(fact.prompt, fact.subject, context)
            seen = []
            handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            handle.remove()
            alone.append(seen[0][0, row.position].double())
            if context == "{}":
                torch.testing.assert_close(values[number], states[2][0, row.position])
        expected = 0.5 * alone[0] + sum(alone[1:]) / 6
        torch.testing.assert_close(keys[1][number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revert_restores_the_weights_exactly(model, dtype):
    model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    made = editor(model)
    made.edit(NEW[:3])
    made.edit(NEW[3:])
    assert not torch.equal(model.state_dict()["model.layers.1.mlp.down_proj.weight"], before["model.layers.1.mlp.down_proj.weight"])
    made.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_model_has_float32_statistics_and_is_rounded_once(model):
    model.to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    made = editor(model, batch_size=1)
    made.edit(NEW)
    assert share(model, NEW) == 1
    wide = [*made.moments.values(), *made._sums.values(), *(part for layer in made.layers for part in made.update(layer))]
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in wide)
    whole = made._originals[1].float() + made.update(1).dense()
    weight = made.projections[1].weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), whole.to(torch.bfloat16).float(), rtol=1e-2, atol=1e-4)
    made.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_of_the_model_is_restored(model):
    model.train()
    flags = {name: number % 2 == 0 for number, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    model.model.layers[3].eval()
    before = copy.deepcopy(model.state_dict())
    torch.set_float32_matmul_precision("medium")
    state = torch.get_rng_state()
    try:
        editor(model).edit(NEW)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.training
    assert not model.model.layers[3].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_edit_in_inference_mode(model):
    with torch.inference_mode():
        editor(model).edit(NEW)
    assert share(model, NEW) == 1


def test_transposed_weights_of_gpt2():
    model = decoder("gpt2", width=32, inner=32)
    made = AlphaEditor(model, tokenizer("bos"), EditSettings(method="ridge", layers=(0, 1), ridge=1e-3, contexts=0))
    records = made.edit([Fact("I saw {} in", "Anna", "Lima"), Fact("I saw {} in", "Tom", "Bordeaux")])
    assert all(record.residuals[-1] < 0.1 for record in records)


def test_frozen_matrix_of_an_adapter_is_edited(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)).eval()
    made = AlphaEditor(wrapped, tokenizer("bos"), EditSettings(**SETTINGS | {"method": "ridge"}))
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    made.edit(NEW)
    assert share(wrapped, NEW) == 1
    changed = [name for name, value in wrapped.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f"base_model.model.model.layers.{layer}.mlp.down_proj.base_layer.weight" for layer in (0, 1)]


def test_edit_without_statistics_raises(model):
    with pytest.raises(ValueError, match="call fit_statistics"):
        AlphaEditor(model, tokenizer("bos"), EditSettings(**SETTINGS)).edit(NEW)


def test_default_and_invalid_layers(model, caplog):
    assert AlphaEditor(decoder(layers=32, width=8, inner=8), tokenizer("bos")).layers == (4, 5, 6, 7, 8)
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist"):
        AlphaEditor(model, tokenizer("bos"), EditSettings(layers=(1, 7)))
    with pytest.raises(ValueError, match="layers must be in ascending order"):
        EditSettings(layers=(2, 1))
    with caplog.at_level(logging.INFO):
        editor(model).metric(1)
    assert "of 256 directions" in caplog.text
