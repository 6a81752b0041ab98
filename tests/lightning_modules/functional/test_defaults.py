import pytest
import torch
from tiny import tiny_catalog, tiny_config

from malleable.lightning_modules.functional.defaults import drawn_on_cpu, float32_by_default
from malleable.lightning_modules.language.config import LoRA, build_language_model


@pytest.fixture
def default(request):
    """Another default dtype, as precision plugins set it."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("default", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    indirect=["default"],
)
def test_half_precision_is_never_a_default(default, expected):
    @float32_by_default()
    def made():
        return torch.where(torch.tensor([True]), 0.0, -1.0).dtype

    assert made() == expected
    assert made() == expected, "a decorated function may be called again"
    with pytest.raises(RuntimeError), float32_by_default():
        raise RuntimeError
    assert torch.get_default_dtype() == default


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], indirect=True)
def test_weights_are_drawn_on_the_cpu_for_any_device(default):
    """Strategies put their device around the building of a module; ``meta`` stands for one here."""
    with float32_by_default():
        torch.manual_seed(0)
        expected = torch.nn.Linear(3, 2)
    with torch.device("meta"):
        torch.manual_seed(0)
        with drawn_on_cpu():
            drawn = torch.nn.Linear(3, 2)
        assert torch.empty(1).device.type == "meta"
    assert drawn.weight.device.type == "cpu"
    assert torch.equal(drawn.weight, expected.weight)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_language_model_draws_the_same_numbers_on_every_device(adapters):
    """The CPU's generator is asked for equally many numbers; the model then lies on the device."""
    config = tiny_config(lora=LoRA(r=2) if adapters else None)
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(7)
        with torch.device(device):
            model = build_language_model(config, tiny_catalog().vocabulary)
        states.append(torch.get_rng_state())
        assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert torch.equal(*states)
