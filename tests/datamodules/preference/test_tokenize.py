"""Prompts as generation reads them, the boundary between prompt and answer, the tokens at both ends, and truncation."""

from dataclasses import replace

import numpy as np
import pytest
from chat_templates import CHATML, TEMPLATES, chat_tokenizer
from shared import shared_data
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from malleable.datamodules.language.tokenizer import load_tokenizer, train_tokenizer
from malleable.datamodules.preference.tokenize import PairTokenizer, TokenizedRow, Truncation
from malleable.datamodules.sources.preference.base import Message

TEXTS = ["What is the capital of Peru?", "Lima, of course.", "I do not know.", "東京です", "  indented", "Line\nbreaks\n\n"]
TALK = (Message("user", TEXTS[0]), Message("assistant", "Cuzco?"), Message("user", "No."))


def merging_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Single letters, and the merged tokens `ab`, `bc` and `cd`."""
    tokens = ["<pad>", "</s>", "<s>", "a", "b", "c", "d", "ab", "bc", "cd"]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("b", "c"), ("a", "b"), ("c", "d")]))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def tokenize_one(pairs: PairTokenizer, prompt, *answers: str) -> TokenizedRow:
    (row,) = pairs.tokenize([prompt], [answers], ["f.jsonl, line 1"])
    return row


def as_text(pairs: PairTokenizer, tokens) -> list[str]:
    return pairs.tokenizer.convert_ids_to_tokens(tokens.tolist())


def messages(turns, *answers: str):
    return [turn._asdict() for turn in (*turns, *(Message("assistant", answer) for answer in answers))]


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("turns", [TALK[:1], TALK], ids=["one turn", "three turns"])
def test_the_prompt_is_what_generation_starts_from(kind, turns):
    tokenizer = chat_tokenizer(kind, TEXTS)
    pairs = PairTokenizer(tokenizer, chat=True)
    row = tokenize_one(pairs, turns, TEXTS[1], TEXTS[3])
    given = tokenizer.apply_chat_template(messages(turns), add_generation_prompt=True)["input_ids"]
    assert row.prompt.tolist() == given
    assert row.text == tokenizer.decode(given)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[kind][1])
    assert pairs.eos_token_id == end
    for answer, text in zip(row.answers, (TEXTS[1], TEXTS[3]), strict=True):
        whole = tokenizer.apply_chat_template(messages(turns, text))["input_ids"]
        found = [*row.prompt, *answer]
        assert whole[: len(found)] == found
        assert len(whole) - len(found) <= 1  # a line break after the turn
        assert answer[-1] == end
        assert (answer == end).sum() == 1


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma"])
def test_the_header_of_a_reply_can_be_scored(kind):
    tokenizer = chat_tokenizer(kind, TEXTS)
    masked, scored = (tokenize_one(PairTokenizer(tokenizer, True, mask), TALK, *TEXTS[1:3]) for mask in (True, False))
    assert scored.prompt.tolist() == tokenizer.apply_chat_template(messages(TALK))["input_ids"]
    header = masked.prompt[len(scored.prompt) :]
    assert tokenizer.decode(header).strip("\n<|>").startswith(("im_start", "start_header_id", "start_of_turn"))
    for one, other in zip(scored.answers, masked.answers, strict=True):
        assert one.tolist() == [*header, *other]
    assert scored.text == masked.text


def test_plain_prompts_can_be_messages_of_the_user():
    tokenizer = chat_tokenizer("chatml", TEXTS)
    plain, messages = (tokenize_one(PairTokenizer(tokenizer, True), prompt, *TEXTS[1:3]) for prompt in (TEXTS[0], TALK[:1]))
    assert plain.text == messages.text
    assert plain.prompt.tolist() == messages.prompt.tolist()


def test_a_template_without_special_tokens_gets_the_end_of_sequence_token():
    tokenizer = chat_tokenizer("chatml", TEXTS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    pairs = PairTokenizer(tokenizer, True)
    row = tokenize_one(pairs, TALK, TEXTS[1])
    assert pairs.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode([*row.prompt, *row.answers[0]]).endswith("assistant: Lima, of course.</s>")


def test_a_tokenizer_without_a_beginning_of_sequence_token_gets_none():
    """Like Qwen, whose `bos_token` is None."""
    tokenizer = chat_tokenizer("chatml", TEXTS)
    tokenizer.bos_token = None
    for chat in (True, False):
        row = tokenize_one(PairTokenizer(tokenizer, chat), TEXTS[0], *TEXTS[1:3])
        assert tokenizer.decode(row.prompt) == row.text


def test_the_beginning_of_sequence_token_is_added_once():
    pairs = PairTokenizer(merging_tokenizer(adds_bos=True), False)
    for prompt in ("ad", "<s>ad"):
        row = tokenize_one(pairs, prompt, "b", "d")
        assert as_text(pairs, row.prompt) == ["<s>", "a", "d"]
    assert tokenize_one(pairs, "", "b", "d").prompt.tolist() == [2]
    without = PairTokenizer(merging_tokenizer(), False)
    assert as_text(without, tokenize_one(without, "ad", "b", "d").prompt) == ["a", "d"]


def test_the_end_of_sequence_token_is_added_once():
    pairs = PairTokenizer(merging_tokenizer(), False)
    row = tokenize_one(pairs, "ad", "b", "b</s>")
    assert [as_text(pairs, answer) for answer in row.answers] == [["b", "</s>"]] * 2


def test_a_merged_token_belongs_to_the_answer_in_all_answers():
    pairs = PairTokenizer(merging_tokenizer(), False)
    row = tokenize_one(pairs, "dab", "cd", "d", "ba")
    assert as_text(pairs, row.prompt) == ["d"]
    # `ab` alone, but `a` and `bc` before a `c`.
    assert [as_text(pairs, answer) for answer in row.answers] == [["a", "bc", "d", "</s>"], ["ab", "d", "</s>"], ["ab", "b", "a", "</s>"]]
    assert row.merged
    row = tokenize_one(pairs, "dab", "d", "ba")
    assert as_text(pairs, row.prompt) == ["d", "ab"]
    assert not row.merged


@pytest.mark.parametrize("load", ["stories260k", "bpe", "across words", pytest.param("smollm2", marks=[pytest.mark.slow, pytest.mark.network])])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(load):
    if load == "stories260k":
        tokenizer = load_tokenizer(str(shared_data("models/stories260k")))
    elif load == "smollm2":
        tokenizer = load_tokenizer("smollm2-135m-instruct-q4_1")
    else:
        tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(TEXTS * 3, 400, across_words=load == "across words"))
    pairs = PairTokenizer(tokenizer, False)
    for prompt in TEXTS:
        answers = [*TEXTS, " Lima", "\nLima"]
        row = tokenize_one(pairs, prompt, *answers)
        for answer, text in zip(row.answers, answers, strict=True):
            assert [*row.prompt, *answer] == [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
        alone = tokenizer(prompt)["input_ids"]
        assert alone[: len(row.prompt)] == row.prompt.tolist()


def test_slow_and_fast_paths_of_several_rows_agree():
    pairs = PairTokenizer(chat_tokenizer("llama3", TEXTS), True)
    prompts, answers = [TALK, TALK[:1], "Hm?"], [("a", "b"), ("c", "d", "e"), ("f", "g")]
    together = pairs.tokenize(prompts, answers, ["x"] * 3)
    for row, prompt, own in zip(together, prompts, answers, strict=True):
        alone = tokenize_one(pairs, prompt, *own)
        assert row.prompt.tolist() == alone.prompt.tolist()
        assert [ids.tolist() for ids in row.answers] == [ids.tolist() for ids in alone.answers]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            TEMPLATES["gemma"][0],
            (Message("system", "Be brief."), *TALK),
            r"f.jsonl, line 1: .*rejects messages of system, user, .*System role not",
        ),
        (None, TALK, "has no chat template, which conversations need"),
        ("{{ messages[0].content }}", TALK, "does not contain each message once"),
        (
            CHATML.replace("assistant\n{%", "assistant\n<think>{%"),
            TALK,
            "f.jsonl, line 1: .*does not continue the prompt from which",
        ),
    ],
)
def test_unusable_templates_are_errors(template, turns, message):
    tokenizer = chat_tokenizer("chatml", TEXTS)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenize_one(PairTokenizer(tokenizer, True), turns, "a", "b")


def test_a_tokenizer_needs_an_end_of_sequence_token():
    tokenizer = merging_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token, so that no answer could end; set its eos_token"):
        PairTokenizer(tokenizer, False)


ROW = TokenizedRow("", np.arange(10, 22, dtype=np.int32), [np.arange(30, 36, dtype=np.int32), np.arange(40, 43, dtype=np.int32)])


@pytest.mark.parametrize(
    ("limits", "prompt", "lengths"),
    [
        (Truncation(), range(10, 22), (6, 3)),
        (Truncation(18), range(10, 22), (6, 3)),
        # As much of the prompt as the longest answer leaves, from its end or from its start.
        (Truncation(16), range(12, 22), (6, 3)),
        (Truncation(16, policy="prompt_end"), range(10, 20), (6, 3)),
        (Truncation(None, 4), range(18, 22), (6, 3)),
        (Truncation(16, 4), range(18, 22), (6, 3)),
        # A quarter of `max_length` is left of the prompt; then answers are shortened.
        (Truncation(4), range(21, 22), (3, 3)),
        (Truncation(8), range(20, 22), (6, 3)),
        (Truncation(7), range(21, 22), (6, 3)),
        (Truncation(17, policy="drop"), None, None),
        (Truncation(18, 11, "drop"), None, None),
        (Truncation(18, 12, "drop"), range(10, 22), (6, 3)),
    ],
)
def test_rows_are_shortened_as_much_as_needed(limits, prompt, lengths):
    row = limits.apply(ROW, 0, 0)
    if prompt is None:
        assert row is None
        return
    assert row.prompt.tolist() == list(prompt)
    assert tuple(map(len, row.answers)) == lengths
    assert row.cut == (row.prompt.tolist() != ROW.prompt.tolist() or lengths != (6, 3))
    assert row.answers[0].tolist() == ROW.answers[0][: lengths[0]].tolist()
    assert limits.max_length is None or len(row.prompt) + max(lengths) <= limits.max_length


def test_shortened_prompts_keep_the_tokens_at_their_ends():
    assert Truncation(None, 4).apply(ROW, 1, 2).prompt.tolist() == [10, 19, 20, 21]
    assert Truncation(None, 4, "prompt_end").apply(ROW, 1, 2).prompt.tolist() == [10, 11, 20, 21]
    assert Truncation(None, 2, "prompt_end").apply(ROW, 1, 5).prompt.tolist() == [10, 21]
    assert Truncation(None, 1).apply(ROW, 1, 0).prompt.tolist() == [10]


def test_the_kept_tokens_are_those_of_the_tokenizer_and_the_template():
    pairs = PairTokenizer(merging_tokenizer(adds_bos=True), False)
    row = pairs.shorten(tokenize_one(pairs, "adadad", "b", "d"), Truncation(None, 3))
    assert as_text(pairs, row.prompt) == ["<s>", "a", "d"]
    tokenizer = chat_tokenizer("chatml", TEXTS)
    pairs = PairTokenizer(tokenizer, True)
    whole = tokenize_one(pairs, TALK, "b", "d")
    row = pairs.shorten(whole, Truncation(None, len(whole.prompt) - 2, "prompt_end"))
    assert tokenizer.decode(row.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row.prompt).startswith("<|im_start|>user\nWhat")


def test_a_shortened_answer_has_no_end_of_sequence_token():
    pairs = PairTokenizer(merging_tokenizer(), False)
    row = pairs.shorten(tokenize_one(pairs, "ad", "dddddd", "a"), Truncation(5))
    assert [as_text(pairs, answer) for answer in row.answers] == [["d"] * 4, ["a", "</s>"]]
    assert replace(Truncation(5), policy="drop").apply(row._replace(answers=[*row.answers, row.answers[0][:1]]), 0, 0) is not None
