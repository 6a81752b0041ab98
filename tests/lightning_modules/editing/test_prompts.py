"""Rows of tokens: where a fact is read, whatever the tokenizer and wherever the subject lies."""

import copy

import pytest
import torch
from small_editing import decoder, tokenizer

from malleable.lightning_modules.editing.prompts import Reader, Row, draw_contexts, fill, look_up

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
def test_the_subject_ends_at_the_token_looked_at(kind, side, prompt, subject, context):
    cut = tokenizer(kind, side)
    row = Reader(cut).row(prompt, subject, context)
    text, span = fill(prompt, subject, context)
    assert text[span.start : span.end] == subject
    until, after = cut.decode(row.ids[: row.position + 1]), cut.decode(row.ids[: row.position])
    strip = {"<s>": "", "▁": " "}
    for mark, plain in strip.items():
        until, after = until.replace(mark, plain), after.replace(mark, plain)
    assert until.strip().startswith(text[: span.end].strip()[:-1]), "the token must reach into the subject's last letter"
    assert len(after.strip()) < len(text[: span.end].strip()), "the token before must end sooner"


@pytest.mark.parametrize("kind", KINDS)
def test_no_end_follows_a_prompt(kind):
    row = Reader(tokenizer(kind)).row("The capital of {} is", "Peru")
    assert row.ids[-1] != 2
    assert (row.ids[0] == 1) == (kind != "bytes")


def test_a_separator_without_an_end_token_is_cut_too():
    cut = copy.deepcopy(tokenizer("eos"))
    cut.eos_token = None
    assert Reader(cut).question("Anna lives in").ids == Reader(tokenizer("eos")).question("Anna lives in").ids
    assert Reader(cut).row("{} lives in", "Anna").ids[-1] != 2


def test_hand_counted_positions():
    # Characters: "ab", " c", "d", " e" of the text "ab cd e", subject "cd".
    offsets = [(0, 0), (0, 2), (2, 4), (4, 5), (5, 7)]
    span = fill("ab {} e", "cd")[1]
    assert [look_up(offsets, span, name) for name in ("subject_first", "subject_last", "subject_first_after_last", "last")] == [2, 3, 4, 4]
    end = fill("ab {}", "cd")[1]
    assert look_up(offsets[:4], end, "subject_first_after_last") == 3, "nothing follows: the last token itself"
    with pytest.raises(ValueError, match="no token overlaps"):
        look_up(offsets, span._replace(start=20, end=22))


def test_only_the_marked_place_is_filled():
    assert fill("{} and Anna", "Anna") == ("Anna and Anna", (0, 4))
    assert fill("Anna and {}", "Anna", "So. {}") == ("So. Anna and Anna", (13, 17))
    assert fill("{} is", "a {} b")[0] == "a {} b is"


@pytest.mark.parametrize("prompt", ["no place", "{} and {}"])
def test_a_prompt_without_one_place_is_refused(prompt):
    with pytest.raises(ValueError, match="exactly once"):
        fill(prompt, "Anna")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_begin_with_a_blank_and_carry_no_marks(kind):
    cut, reader = tokenizer(kind), Reader(tokenizer(kind))
    assert reader.answer("Lima") == reader.answer(" Lima")
    assert not set(reader.answer("Lima")) & {0, 1, 2}
    row = reader.row("The capital of {} is", "Peru", answer=reader.answer("Lima"))
    assert row.ids[-len(reader.answer("Lima")) :] == reader.answer("Lima")
    assert cut.decode(row.ids).replace("<s>", "").strip() == "The capital of Peru is Lima"


def test_a_blank_at_the_end_of_a_prompt_is_cut():
    reader = Reader(tokenizer())
    assert reader.row("The capital of {} is ", "Peru") == reader.row("The capital of {} is", "Peru")


def test_rows_are_filled_up_on_the_right_whatever_the_tokenizer_says():
    batch = Reader(tokenizer("bos", "left")).batch([Row([1, 7, 8], 2), Row([1], 0)])
    assert batch.input_ids.tolist() == [[1, 7, 8], [1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    part = batch.take(torch.tensor([1]))
    assert part.input_ids.tolist() == [[1]]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        Reader(Slow())


def test_contexts_are_the_models_own_and_the_seeds():
    model, cut = decoder(), tokenizer("bos")
    first, again, other = (draw_contexts(model, cut, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first) == 5
    for context, start in zip(first, ("The", "Therefore", "Because", "I", "You"), strict=True):
        assert context.startswith(start)
        assert context.endswith(". {}")
        assert context.count("{") == 1
        assert "<s>" not in context
