"""Comparison of the forms of each pass with reference passes of one sequence at a time.

Shapes: B prompts, K answers, A answer tokens, N = B * K sequences, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.attention import MASKED_ATTENTION, AttentionSpan, mask_plans
from malleable.lightning_modules.functional.language.chunked_head import HeadForm
from malleable.lightning_modules.functional.language.free_text import CachedDecoder
from malleable.lightning_modules.functional.language.logps import packed_row_logps, separate_logps, shared_logps
from malleable.lightning_modules.functional.language.pass_forms import Capability, PassForms, RowForm
from malleable.lightning_modules.functional.language.pass_twin import build_twin, small_windows
from malleable.lightning_modules.functional.language.selected_logps import selected_token_logps
from malleable.lightning_modules.functional.language.tree_attention import TreeDecoder, evaluating
from malleable.lightning_modules.functional.language.whole_rows import reset_rope, states_at_end

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # in nats, for a small float32 copy: exact forms differ by 1e-6, others by 0.01 or more
MODEL_TOLERANCE = 1e-3  # for the weights of the model itself, whose logits may be large
MASKED = ("shared", "packed", "tree")  # forms that need a custom mask
PROMPTS = (3, 7, 5)
ANSWERS = ((4, 2), (3, 3), (1, 4))  # two sequences have equal length


@dataclass
class Sample:
    """Random prompts with answers, and the results of reference passes.

    Attributes:
        prompt_ids: ``(B, P)``, padded on the left.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)``, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        sequences: Tokens of each prompt and answer.
        logps: ``(N, longest - 1)`` float32, log-probability of each token but the first; 0 on padding.
        states: ``(N, d)`` float32, hidden states at the last tokens; ``None`` if the model returns none.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    sequences: list[list[int]]
    logps: Tensor
    states: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return prompts and answers in the order of the arguments of the passes."""
        return self.prompt_ids, self.prompt_mask, self.answer_ids, self.answer_mask

    @property
    def answer_logps(self) -> Tensor:
        """Return log-probabilities of the answers' tokens, ``(B, K, A)``."""
        place = self.prompt_mask.sum(1)[:, None] - 1 + torch.arange(self.answer_ids.shape[2], device=self.logps.device)
        place = place.clamp_max(self.logps.shape[1] - 1)[:, None].expand(self.answer_ids.shape)
        logps = self.logps.reshape(*self.answer_ids.shape[:2], -1).gather(2, place)
        return logps.masked_fill(~self.answer_mask, 0.0)


Run = Callable[[Any, Sample, tuple[AttentionSpan, ...]], tuple[Tensor, Tensor]]
"""Runs a form, and returns its result and that of the reference passes."""


def check_passes(model: nn.Module) -> PassForms:
    """Find which forms of a model's passes are exact, by comparison with passes of one sequence at a time on random tokens.

    A form is a layout of sequences in rows, with its mask and cache, see :mod:`~malleable.lightning_modules.functional.language.pass_forms`. A small
    copy of the model is compared, or the model itself if no copy can be built.

    Args:
        model: Hugging Face causal language model without adapters.

    Raises:
        ValueError: If the model cannot run a reference pass, or is not causal.
    """
    with _default_environment():
        try:
            return _check_twin(model)
        except Exception as error:
            log.debug("no small copy of %s can be checked: %s", type(model).__name__, error)
        limit = small_windows(model.config)[1]
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        forms = _limited(_measure(model, model, max(MODEL_TOLERANCE, 64 * torch.finfo(dtype).eps)), limit)
        return forms if math.isinf(small_windows(model.config, rope=False)[1]) else replace(forms, tree=Capability())


def _check_twin(model: nn.Module) -> PassForms:
    """Measure a small copy with short windows; forms that are not exact for it can still be exact for rows shorter than the original windows."""
    config, limit = small_windows(model.config)
    forms = _measure(model, build_twin(model, config), TOLERANCE)
    names = [name for name in _FORMS if not getattr(forms, name).limit]
    if math.isinf(limit) or not names:
        return forms
    short = _limited(_measure(model, build_twin(model, model.config), TOLERANCE), limit)
    if "tree" in names and _counts_columns(model):
        names.remove("tree")
    return replace(forms, unpadded=forms.unpadded, **{name: getattr(short, name) for name in names})


def _counts_columns(model: nn.Module) -> bool:
    """Return whether a model applies its windows to columns of the cache, which no mask can express.

    A tree of beams has more columns than any of its sequences has tokens, so it is not exact for any length of sequences.
    """
    config, limit = small_windows(model.config, rope=False)
    return math.isfinite(limit) and not _measure(model, build_twin(model, config), TOLERANCE).tree.limit


def _limited(forms: PassForms, limit: float) -> PassForms:
    """Restrict the forms to rows of at most ``limit`` tokens."""
    capabilities = {name: getattr(forms, name) for name in _FORMS}
    return replace(forms, **{name: replace(value, limit=min(value.limit, limit)) for name, value in capabilities.items()})


@contextmanager
def _default_environment() -> Iterator[None]:
    """Run on the CPU in float32 without autocast, and restore the caller's random generators, default device and default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _measure(model: Any, twin: Any, tolerance: float) -> PassForms:
    """Compare every form with the reference passes.

    Args:
        model: Model whose forms are measured.
        twin: Model that is run: a small copy of ``model``, or ``model`` itself.
        tolerance: Maximum difference of log-probabilities, in nats.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    # A small copy may have shorter windows than the model, but its plans have the same number and order.
    plans = list(zip(mask_plans(twin.config), mask_plans(model.config), strict=True)) if attention in MASKED_ATTENTION else []
    found: dict[str, Capability] = {}
    reasons: list[tuple[str, str]] = []
    with evaluating(twin):
        sample = _draw(twin)
        for name, run in _FORMS.items():
            reason = f"attention '{attention}' does not accept a custom mask"
            for own, plan in plans if name in MASKED else [((), ())]:
                reason = _failure(run, twin, sample, own, tolerance)
                if not reason:
                    found[name] = Capability(math.inf, plan)
                    break
            if reason:
                reasons.append((name, reason))
        unpadded = not _failure(_run_unpadded, twin, sample, (), tolerance)
        head = _head_form(twin, sample) if unpadded else None
        if head is not None and _failure(partial(_run_head, head=head), twin, sample, (), tolerance):
            head = None
    states = sample.states is not None
    return PassForms(type(model).__name__, **found, unpadded=unpadded, states=states, head=head, reasons=tuple(reasons))


def _head_form(model: Any, sample: Sample) -> HeadForm | None:
    """Find the function from the output of the language-model head to logits, by replacing this output; ``None`` if it is of no known form."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    outputs: list[Tensor] = []

    def logits_of(output: Callable[[Tensor], Tensor]) -> Tensor:
        def replace_output(_: nn.Module, inputs: Any, found: Tensor) -> Tensor:
            outputs.append(output(found))
            return outputs[-1]

        handle = head.register_forward_hook(replace_output)
        try:
            logits: Tensor = model(input_ids=sample.prompt_ids[:1, -2:], use_cache=False).logits
            return logits
        finally:
            handle.remove()

    try:
        # A cap has no effect on small outputs, and is the logit of large ones.
        small, large = (logits_of(lambda found, size=size: torch.full_like(found, size)) for size in (2.0**-10, 1e4))  # type: ignore[misc]
        scale, bound = float(small.flatten()[0]) * 2**10, float(large.flatten()[0])
        form = HeadForm(scale, math.inf if bound > 0.5e4 * scale else bound)
        outputs.clear()
        spread = 64 / scale
        logits = logits_of(lambda found: torch.linspace(-spread, spread, found.numel(), dtype=found.dtype, device=found.device).reshape(found.shape))
        (output,) = outputs
        eps = max(1e-6, torch.finfo(logits.dtype).eps)
        return form if output.shape == logits.shape and torch.allclose(form.logits(output), logits, rtol=4 * eps, atol=4 * eps) else None
    except Exception as error:  # models raise various exceptions; the plain form is then used
        log.debug("the head of %s cannot be probed: %s", type(model).__name__, error)
        return None


def _run_head(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...], head: HeadForm) -> tuple[Tensor, Tensor]:
    return separate_logps(model, *sample.parts, form="unpadded", head=head), sample.answer_logps


def _failure(run: Run, model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...], tolerance: float) -> str:
    """Run a form, and return the reason why it is not exact; an empty string if it is exact."""
    reset_rope(model)
    try:
        got, expected = run(model, sample, plan)
    # Models reject arguments with various exceptions; each means that the form cannot be used.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    difference = float((got.float() - expected).abs().max())
    return "" if difference <= tolerance else f"differs by {difference:.2g} from reference passes"


def _draw(model: Any) -> Sample:
    """Draw a sample and run the reference passes."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    special = {value for name in ("pad_token_id", "bos_token_id", "eos_token_id") if isinstance(value := getattr(config, name, None), int)}
    usable = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])

    def tokens(count: int) -> list[int]:
        drawn: list[int] = usable[torch.randint(len(usable), (count,), generator=generator)].tolist()
        return drawn

    prompts = [tokens(length) for length in PROMPTS]
    answers = [[tokens(length) for length in lengths] for lengths in ANSWERS]
    sequences = [prompt + answer for prompt, row in zip(prompts, answers, strict=True) for answer in row]
    width, longest = max(PROMPTS), max(map(max, ANSWERS))
    logps, states = zip(*(_plain_pass(model, torch.tensor([sequence], device=device)) for sequence in sequences), strict=True)
    _check_causal(model, sequences[0], logps[0])
    return Sample(
        prompt_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device),
        prompt_mask=torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device),
        answer_ids=torch.tensor([[answer + [0] * (longest - len(answer)) for answer in row] for row in answers], device=device),
        answer_mask=torch.tensor([[[True] * len(answer) + [False] * (longest - len(answer)) for answer in row] for row in answers], device=device),
        sequences=sequences,
        logps=torch.nn.utils.rnn.pad_sequence(list(logps), batch_first=True),
        states=None if states[0] is None else torch.cat(states),
    )


def _check_causal(model: nn.Module, sequence: Sequence[int], logps: Tensor) -> None:
    """Raise an error if the logits depend on later tokens, i.e. on the answers that are to be predicted."""
    other = [*sequence[:-1], next(token for token in sequence[:-1] if token != sequence[-1])]
    changed, _ = _plain_pass(model, torch.tensor([other], device=logps.device))
    if not torch.allclose(changed[:-1], logps[:-1], atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} attends to later tokens and cannot be trained or decoded as a causal language model; "
            "use a decoder, or save this model with is_decoder=True in its configuration"
        )


def _plain_pass(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run one sequence; return its log-probabilities ``(T - 1,)``, and the hidden state of the last token ``(1, d)`` or ``None``."""
    reset_rope(model)
    try:
        output = model(input_ids=input_ids, output_hidden_states=True, use_cache=False)
    except Exception:
        output = model(input_ids=input_ids, use_cache=False)
    states = getattr(output, "hidden_states", None)
    # Some models return several hidden states for each token, stacked in a fourth dimension.
    state = states[-1][:, -1].float() if states is not None and states[-1].ndim == 3 else None
    return selected_token_logps(output.logits[:, :-1], input_ids[:, 1:])[0], state


def _run_shared(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    return shared_logps(model, *sample.parts, plan=plan), sample.answer_logps


def _run_packed(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    half = len(sample.sequences) // 2
    rows = [_pack(sample.sequences[:half]), _pack(sample.sequences[half:])]
    device = sample.prompt_ids.device
    input_ids, document_ids, position_ids = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[part], device=device) for row in rows], batch_first=True) for part in range(3)
    )
    logps, targets = packed_row_logps(model, input_ids, document_ids, position_ids, plan=plan)
    lengths = [len(sequence) - 1 for sequence in sample.sequences]
    return logps[targets], torch.cat([row[:length] for row, length in zip(sample.logps, lengths, strict=True)])


def _pack(documents: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Concatenate documents; return tokens, document numbers and positions."""
    tokens = [token for document in documents for token in document]
    numbers = [number for number, document in enumerate(documents, 1) for _ in document]
    return tokens, numbers, [position for document in documents for position in range(len(document))]


def _run_tree(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    decoder = TreeDecoder(model, sample.prompt_ids, sample.prompt_mask, plan)
    rows, count, width = sample.answer_ids.shape
    logits = [decoder.logits.expand(-1, count, -1)]
    parent = torch.zeros(rows, count, dtype=torch.long, device=sample.prompt_ids.device)
    for depth in range(width - 1):
        logits.append(decoder.extend(sample.answer_ids[..., depth], parent, depth))
        parent = torch.arange(count, device=parent.device).expand(rows, -1)
    stacked = torch.stack(logits, 2)
    logps = selected_token_logps(stacked.flatten(1, 2), sample.answer_ids.flatten(1)).reshape(sample.answer_ids.shape)
    return logps.masked_fill(~sample.answer_mask, 0.0), sample.answer_logps


def _run_cached(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    decoder = CachedDecoder(model, sample.prompt_ids, sample.prompt_mask)
    ids, mask = sample.answer_ids[:, -1], sample.answer_mask[:, -1]
    logits = [decoder.logits]
    logits += [decoder.extend(ids[:, depth : depth + 1], mask[:, depth : depth + 1]) for depth in range(ids.shape[1] - 1)]
    return selected_token_logps(torch.cat(logits, 1), ids).masked_fill(~mask, 0.0), sample.answer_logps[:, -1]


def _run_padded(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    return separate_logps(model, *sample.parts, form="padded"), sample.answer_logps


def _run_embedding(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...], form: RowForm = "padded") -> tuple[Tensor, Tensor]:
    if sample.states is None:
        raise ValueError("the model does not return one hidden state for each token")
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, device=sample.states.device) for row in sample.sequences], batch_first=True)
    lengths = torch.tensor([len(row) for row in sample.sequences], device=sample.states.device)
    return states_at_end(model, input_ids, lengths, form=form), sample.states


def _run_causal(model: Any, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    if model.config._attn_implementation != "sdpa":
        raise ValueError("attention other than SDPA has no causal kernels")
    return _run_whole(model, sample, "causal")


def _run_unpadded(model: nn.Module, sample: Sample, plan: tuple[AttentionSpan, ...]) -> tuple[Tensor, Tensor]:
    return _run_whole(model, sample, "unpadded")


def _run_whole(model: nn.Module, sample: Sample, form: RowForm) -> tuple[Tensor, Tensor]:
    """Run whole sequences; return log-probabilities and hidden states, concatenated."""
    got, expected = separate_logps(model, *sample.parts, form=form), sample.answer_logps
    if sample.states is None:
        return got, expected
    states, expected_states = _run_embedding(model, sample, (), form)
    return torch.cat([got.flatten(), states.flatten()]), torch.cat([expected.flatten(), expected_states.flatten()])


_FORMS: dict[str, Run] = {
    "shared": _run_shared,
    "packed": _run_packed,
    "tree": _run_tree,
    "cached": _run_cached,
    "padded": _run_padded,
    "embedding": _run_embedding,
    "causal": _run_causal,
}
