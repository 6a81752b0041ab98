"""Log-probabilities and gradients of a chunked head equal those of all logits at once, which are never stored."""

import pytest
import torch
from architectures import HIDDEN, tiny_model
from launch import HELPERS, launch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import batch_of
from torch.utils._python_dispatch import TorchDispatchMode

from malleable.lightning_modules.functional.language import chunked_head
from malleable.lightning_modules.functional.language.chunked_head import HeadForm, head_logps
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_token_logps
from malleable.lightning_modules.functional.language.pass_forms import bare_model, pass_forms
from malleable.lightning_modules.functional.language.selected_logps import selected_token_logps
from malleable.lightning_modules.language.config import dropout_off

P, V, D = 5, 7, 3
PAIRS = [{"sample_id": n, "prompt": [5, 6, 7, 8][: n + 2], "answers": [[9, 10, 11, 12, 2][n:], [13, 14, 2][: n + 1]]} for n in range(3)]
DOCUMENTS = [{"sample_id": n, "input_ids": [5, 6, 7, 8, 9, 10, 11], "document_ids": [1, 1, 1, 2, 2, 2, 2]} for n in range(2)]
LONG = [{"sample_id": n, "input_ids": [5, 6, 7, 8, 9, 10, 11], "document_ids": [1] * 7} for n in range(2)]


def answers(model, **options):
    batch = batch_of(PAIRS)
    parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
    return answer_token_logps(model, *parts, num_columns=batch.answer_columns, **options)


def documents(model, rows):
    batch = batch_of(rows)
    return packed_token_logps(model, batch.input_ids, batch.document_ids, batch.position_ids, one_document=batch.one_document)[0]


PASSES = {
    "answers": answers,
    "one row for each answer": lambda model: answers(model, shared_prompt=False),
    "packed documents": lambda model: documents(model, DOCUMENTS),
    "one document in each row": lambda model: documents(model, LONG),
}


@pytest.fixture
def chunked(monkeypatch):
    """Return a function that switches chunks of three positions of a vocabulary of 64 on or off."""

    def switch(on, positions=3):
        for name in ("LIMIT", "ACCELERATOR_LIMIT"):
            monkeypatch.setattr(chunked_head, name, 0 if on else 1 << 24)
        for name in ("CHUNK", "ACCELERATOR_CHUNK"):
            monkeypatch.setattr(chunked_head, name, positions * 64)

    return switch


class Sizes(TorchDispatchMode):
    """Records the largest number of positions whose logits, gradients or probabilities are in one tensor."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.largest = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            # Transposed weights and their gradient have the width of the states in front.
            if isinstance(tensor, torch.Tensor) and self.vocab in tensor.shape[-1:] and HIDDEN not in tensor.shape[-2:-1]:
                self.largest = max(self.largest, tensor.numel() // self.vocab)
        return found


def results(model, run):
    model.zero_grad()
    logps = run(model)
    (logps.square().sum() / 100).backward()
    return [logps.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


# Tied and untied weights, a bias, a scale, a cap, and a state that separate rows must recompute.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "cohere", "granite", "gemma2", "lfm2"])
@pytest.mark.parametrize("name", PASSES)
def test_values_and_gradients_equal_those_of_all_logits(kind, name, chunked):
    found = []
    for on in (False, True):
        chunked(on)
        found.append(results(tiny_model(kind), PASSES[name]))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("name", PASSES)
def test_no_tensor_has_the_logits_of_all_positions(kind, name, frozen, chunked):
    model = tiny_model(kind, vocab_size=67, tie_word_embeddings=False)
    model.lm_head.requires_grad_(not frozen)
    largest = {}
    for on in (False, True):
        chunked(on)
        pass_forms(model)
        with Sizes(67) as sizes:
            results(model, PASSES[name])
        largest[on] = sizes.largest
    # A chunk has 3 * 64 // 67 = 2 positions.
    assert largest[True] <= 2 < 8 <= largest[False]


@pytest.mark.parametrize(
    ("kind", "options", "form"),
    [
        ("llama", {}, HeadForm()),
        ("phi", {}, HeadForm()),
        ("gemma2", {"final_logit_softcapping": 30.0}, HeadForm(cap=30.0)),
        ("gemma2", {"final_logit_softcapping": 1000.0}, HeadForm(cap=1000.0)),
        ("gemma2", {"final_logit_softcapping": None}, HeadForm()),
        ("cohere", {"logit_scale": 0.0625}, HeadForm(scale=0.0625)),
        ("granite", {"logits_scaling": 8.0}, HeadForm(scale=0.125)),
    ],
)
def test_the_function_from_output_to_logits_is_measured(kind, options, form):
    assert pass_forms(tiny_model(kind, **options)).head == form


def test_logits_of_another_form_are_computed_at_once(chunked):
    from transformers import LlamaForCausalLM

    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits + torch.arange(64.0) / 64
            return output

    chunked(True)
    model = Shifted(tiny_model("llama").config).eval()
    assert pass_forms(model).head is None
    with Sizes(64) as sizes:
        answers(model)
    assert sizes.largest > 8


def test_few_logits_are_computed_at_once(monkeypatch):
    monkeypatch.setattr(chunked_head, "head_logps", lambda *_: pytest.fail("computed in chunks"))
    monkeypatch.setattr("malleable.lightning_modules.functional.language.logps.head_logps", lambda *_: pytest.fail("computed in chunks"))
    for run in PASSES.values():
        run(tiny_model("llama"))


class OneHead(torch.nn.Module):
    """A model that is nothing but its head."""

    def __init__(self, dtype=torch.float64, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = torch.nn.Linear(D, V, bias=bias, dtype=dtype)
        self.config = type("Config", (), {"vocab_size": V})

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["all", "frozen weights", "frozen states"])
@pytest.mark.parametrize("form", [HeadForm(), HeadForm(0.5, 3.0)], ids=["plain", "capped"])
def test_first_and_second_derivatives(form, trained, monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK", 3 * V)
    model, targets = OneHead(), torch.randint(V, (P,))
    states, weight = torch.randn(P, D, dtype=torch.float64), model.lm_head.weight.detach().clone()
    del model.lm_head.weight

    def run(states, weight):
        model.lm_head.weight = weight
        return head_logps(model, states, targets, form)

    inputs = tuple(tensor.requires_grad_(wanted) for tensor, wanted in zip((states, weight), trained, strict=True))
    expected = (form.logits(states @ weight.T)).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(run(*inputs), expected)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("setting", ["bfloat16", "float16", "autocast"])
def test_half_precision_rounds_as_all_logits_do(setting, frozen, monkeypatch):
    """The log-softmax is computed in float32; gradients have the dtype of their tensors, and errors of the size of their roundings."""
    monkeypatch.setattr(chunked_head, "CHUNK", 3 * V)
    dtype = {"autocast": torch.float32}.get(setting) or getattr(torch, setting)
    targets, found = torch.randint(V, (P,)), []
    for ours in (False, True):
        model = OneHead(dtype)
        model.lm_head.requires_grad_(not frozen)
        states = torch.linspace(-2, 2, P * D).reshape(P, D).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            own = head_logps(model, states, targets, HeadForm())
            logps = own if ours else selected_token_logps(model.lm_head(states)[None], targets[None])[0]
        logps.square().sum().backward()
        assert logps.dtype == torch.float32
        found.append([logps.detach(), *(tensor.grad for tensor in (states, model.lm_head.weight) if tensor.grad is not None)])
        assert all(grad.dtype == dtype for grad in found[-1][1:])
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=0)
    for ours, plain in zip(found[1][1:], found[0][1:], strict=True):
        torch.testing.assert_close(ours, plain, atol=2 ** (-9 if dtype == torch.float16 else -6), rtol=2**-6)


def with_adapters(**options):
    torch.manual_seed(0)
    model = tiny_model("llama", tie_word_embeddings=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, **options))
    return adapted.train()


def test_adapters_of_the_head(chunked):
    found = []
    for on in (False, True):
        chunked(on)
        model = with_adapters()
        found.append(results(model, answers))
        assert bare_model(model).lm_head.lora_A.default.weight.grad.any()
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_dropout_of_the_head_is_repeated_in_the_backward_pass(chunked, monkeypatch):
    chunked(True)
    model, found = with_adapters(lora_dropout=0.5), []
    for stored in (False, True):
        if stored:
            monkeypatch.setattr(chunked_head, "checkpoint", lambda function, *arguments, **_: function(*arguments))
        torch.manual_seed(1)
        found.append(results(model, answers))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_disabled_dropout_stays_disabled_in_the_backward_pass(chunked):
    """The backward pass comes after the context that disables dropout."""
    model, found = with_adapters(lora_dropout=0.5), []
    for on in (False, True):
        chunked(on)

        def run(model):
            with dropout_off(model):
                return answers(model)

        found.append(results(model, run))
        assert model.training
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_and_adapters(chunked):
    found = []
    for on in (False, True):
        chunked(on)
        model = with_adapters()
        # The method was renamed in transformers 5.23.
        base = bare_model(model)
        (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
        found.append(results(model, answers))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_hooks_of_the_head_run_for_each_chunk(chunked):
    chunked(True)
    model, seen = tiny_model("llama"), []
    pass_forms(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    answers(model).sum().backward()
    # One position in the model's own pass; the slots of all answers by chunks, in the forward and in the backward pass.
    batch = batch_of(PAIRS)
    slots = batch.answer_ids.shape[0] * (batch.answer_ids.shape[1] + batch.answer_columns)
    assert (max(seen), sum(seen)) == (3, 1 + 2 * slots)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("options", [["zero3"], ["zero3", "checkpointing"], ["fsdp2"]], ids=" ".join)
def test_sharded_weights_are_trained_as_whole_ones(options, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "sharded").mkdir()
    launch([HELPERS / "long_answers_run.py", tmp_path / "whole", "auto", "plain"], ranks=1, timeout_s=300)
    launch([HELPERS / "long_answers_run.py", tmp_path / "sharded", *options], env={"CPU_DEEPSPEED_PARTITION_ALL": "1"}, timeout_s=300)
    whole, sharded = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=1e-5)
