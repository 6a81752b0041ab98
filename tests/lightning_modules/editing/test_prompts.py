"""Encoding of prompts: position of the fact token, answers and padding, for different tokenizers."""

import copy

import pytest
import torch
from small_editing import decoder, tokenizer

from malleable.lightning_modules.editing.prompts import PromptEncoder, Row, fill_prompt, find_fact_token, generate_contexts

KINDS = ("bytes", "bos", "pieces", "eos")
PROMPTS = [
    ("{} was born in", "Danielle Darrieux"),
    ("The mother tongue of {} is", "Danielle Darrieux"),
    ("I saw {}", "Anna"),
    ("Anna knows that {} is happy", "Anna"),
    ("The capital of {} is", "Zürich"),
    ("{}", "Tom {x} Anna"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("prompt", "subject"), PROMPTS)
@pytest.mark.parametrize("context", ["{}", "The big dog. {}"])
def test_fact_token_is_the_last_token_of_the_subject(kind, side, prompt, subject, context):
    cut = tokenizer(kind, side)
    row = PromptEncoder(cut).encode_prompt(prompt, subject, context)
    text, span = fill_prompt(prompt, subject, context)
    assert text[span.start : span.end] == subject
    until, after = cut.decode(row.ids[: row.position + 1]), cut.decode(row.ids[: row.position])
    strip = {"<s>": "", "▁": " "}
    for mark, plain in strip.items():
        until, after = until.replace(mark, plain), after.replace(mark, plain)
    assert until.strip().startswith(text[: span.end].strip()[:-1]), "the token must reach into the subject's last letter"
    assert len(after.strip()) < len(text[: span.end].strip()), "the token before must end sooner"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_has_no_end_of_sequence_token(kind):
    row = PromptEncoder(tokenizer(kind)).encode_prompt("The capital of {} is", "Peru")
    assert row.ids[-1] != 2
    assert (row.ids[0] == 1) == (kind != "bytes")


def test_separator_is_removed_without_an_eos_token():
    cut = copy.deepcopy(tokenizer("eos"))
    cut.eos_token = None
    assert PromptEncoder(cut).encode_text("Anna lives in").ids == PromptEncoder(tokenizer("eos")).encode_text("Anna lives in").ids
    assert PromptEncoder(cut).encode_prompt("{} lives in", "Anna").ids[-1] != 2


def test_positions_for_each_fact_token():
    # Characters: "ab", " c", "d", " e" of the text "ab cd e", subject "cd".
    offsets = [(0, 0), (0, 2), (2, 4), (4, 5), (5, 7)]
    span = fill_prompt("ab {} e", "cd")[1]
    assert [find_fact_token(offsets, span, name) for name in ("subject_first", "subject_last", "subject_first_after_last", "last")] == [2, 3, 4, 4]
    end = fill_prompt("ab {}", "cd")[1]
    assert find_fact_token(offsets[:4], end, "subject_first_after_last") == 3, "nothing follows: the last token itself"
    with pytest.raises(ValueError, match="no token overlaps"):
        find_fact_token(offsets, span._replace(start=20, end=22))


def test_only_the_placeholder_is_filled():
    assert fill_prompt("{} and Anna", "Anna") == ("Anna and Anna", (0, 4))
    assert fill_prompt("Anna and {}", "Anna", "So. {}") == ("So. Anna and Anna", (13, 17))
    assert fill_prompt("{} is", "a {} b")[0] == "a {} b is"


@pytest.mark.parametrize("prompt", ["no place", "{} and {}"])
def test_prompt_without_exactly_one_placeholder_raises(prompt):
    with pytest.raises(ValueError, match="exactly once"):
        fill_prompt(prompt, "Anna")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_begin_with_a_space_and_have_no_special_tokens(kind):
    cut, encoder = tokenizer(kind), PromptEncoder(tokenizer(kind))
    assert encoder.encode_answer("Lima") == encoder.encode_answer(" Lima")
    assert not set(encoder.encode_answer("Lima")) & {0, 1, 2}
    row = encoder.encode_prompt("The capital of {} is", "Peru", answer=encoder.encode_answer("Lima"))
    assert row.ids[-len(encoder.encode_answer("Lima")) :] == encoder.encode_answer("Lima")
    assert cut.decode(row.ids).replace("<s>", "").strip() == "The capital of Peru is Lima"


def test_trailing_space_of_a_prompt_is_removed():
    encoder = PromptEncoder(tokenizer())
    assert encoder.encode_prompt("The capital of {} is ", "Peru") == encoder.encode_prompt("The capital of {} is", "Peru")


def test_rows_are_padded_on_the_right():
    batch = PromptEncoder(tokenizer("bos", "left")).collate([Row([1, 7, 8], 2), Row([1], 0)])
    assert batch.input_ids.tolist() == [[1, 7, 8], [1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    part = batch.select(torch.tensor([1]))
    assert part.input_ids.tolist() == [[1]]


def test_slow_tokenizer_raises():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        PromptEncoder(Slow())


def test_contexts_depend_on_the_seed():
    model, cut = decoder(), tokenizer("bos")
    first, again, other = (generate_contexts(model, cut, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first) == 5
    for context, start in zip(first, ("The", "Therefore", "Because", "I", "You"), strict=True):
        assert context.startswith(start)
        assert context.endswith(". {}")
        assert context.count("{") == 1
        assert "<s>" not in context
