import pytest
from shared import shared_data
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from malleable.datamodules.language.tokenizer import load_tokenizer, train_tokenizer
from malleable.datamodules.recommendation.prompt import PromptTemplate, encode, tokenize

TITLES = ["Toy Story (1995)", "Heat (1995)", 'A Child Called "It" (Dave Pelzer #1)', "M*A*S*H (1970)", "Á köldum klaka (1994)", "10 Things", "S.O.S."]
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def bpe(pattern):
    """A byte-level BPE that has seen many prompts, so that it joins whatever its pattern allows."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    template = PromptTemplate.named("instruction")
    text = template.text(TITLES, TITLES) + "".join(template.answer.replace("{title}", title) for title in TITLES)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([text] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tokenizers():
    yield "trained", lambda: load_tokenizer(str(train_tokenizer(TITLES * 3, 400)))
    yield "gpt2", lambda: bpe("gpt2")
    yield "llama3", lambda: bpe("llama3")
    yield "llama2", lambda: load_tokenizer(str(shared_data("models/stories260k")))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in tokenizers()])
@pytest.mark.parametrize("name", ["history", "instruction"])
def test_pieces_equal_the_tokens_of_the_whole_text(name, make):
    tokenizer = make()
    template = PromptTemplate.named(name)
    pieces = tokenize(template, TITLES, tokenizer)
    items = list(range(len(TITLES)))
    assert pieces.prompt(items) == tokenizer(template.text(TITLES))["input_ids"]
    assert pieces.prompt(items[:3], items[3:]) == tokenizer(template.text(TITLES[:3], TITLES[3:]))["input_ids"]
    for target, title in enumerate(TITLES):
        whole = template.text(TITLES[:2]) + template.answer.replace("{title}", title) + tokenizer.eos_token
        assert pieces.prompt([0, 1]) + list(pieces.answers[target]) == tokenizer(whole)["input_ids"]


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_pieces_equal_the_tokens_of_the_whole_text():
    tokenizer = load_tokenizer("smollm2-135m-instruct-q4_1")
    template = PromptTemplate.named("instruction")
    assert tokenize(template, TITLES, tokenizer).prompt(range(len(TITLES))) == tokenizer(template.text(TITLES))["input_ids"]


def test_the_instruction_is_short():
    pieces = tokenize(PromptTemplate.named("instruction"), TITLES, bpe("gpt2"))
    text = PromptTemplate.named("instruction")
    assert len((text.prefix + text.suffix).split()) <= 15
    assert len(pieces.prompt([])) <= 30


def test_text_is_one_quoted_title_a_line():
    assert PromptTemplate.named("instruction").text(["Heat", "Alien"], ["Up"]) == (
        'The user enjoyed, in this order:\n"Heat"\n"Alien"\nChoose one of:\n"Up"\nNext the user will enjoy:'
    )
    assert PromptTemplate.named("history").text(["Heat", "Alien"]) == "Heat</s>Alien</s>"


def test_a_packed_history_is_the_prompt_and_its_answer():
    pieces = tokenize(PromptTemplate.named("history"), TITLES, load_tokenizer(str(train_tokenizer(TITLES, 400))))
    assert pieces.document([0, 3, 2]) == pieces.prompt([0, 3]) + list(pieces.answers[2])


def test_answers_are_tokenised_as_after_the_prompt_and_end_with_eos():
    tokenizer = bpe("gpt2")
    pieces = tokenize(PromptTemplate.named("instruction"), TITLES, tokenizer)
    assert all(answer[-1] == tokenizer.eos_token_id for answer in pieces.answers)
    assert {tokenizer.decode(answer[:1]) for answer in pieces.answers} == {' "'}


def test_prompts_without_candidates():
    pieces = tokenize(PromptTemplate.named("instruction"), TITLES, bpe("gpt2"))
    plain = tokenize(PromptTemplate(candidates_prefix=None), TITLES, bpe("gpt2"))
    assert len(pieces.prompt([0])) < len(pieces.prompt([0], [1]))
    assert plain.prompt([0], [1]) == plain.prompt([0])


def test_a_prompt_starts_with_the_bos_token():
    tokenizer = load_tokenizer(str(shared_data("models/stories260k")))
    assert tokenize(PromptTemplate(), TITLES, tokenizer).prompt([0])[0] == tokenizer.bos_token_id


def test_encode_of_nothing():
    assert encode(bpe("gpt2"), []) == []


def words(vocabulary, **special):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_a_title_without_tokens_is_an_error():
    letters = {letter: index for index, letter in enumerate("Heat")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")
    with pytest.raises(ValueError, match=r"1 titles have no tokens with the tokenizer '.*', e.g. '漢字'; remove them"):
        tokenize(PromptTemplate(), ["Heat", "漢字"], tokenizer)


def test_titles_with_equal_tokens_give_a_warning(caplog):
    tokenizer = words({"<unk>": 0, "</s>": 1}, eos_token="</s>", unk_token="<unk>")
    tokenize(PromptTemplate(), ["Heat", "Alien"], tokenizer)
    assert "1 titles have the same tokens as another" in caplog.text


def test_a_tokenizer_without_eos_token_is_an_error():
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        tokenize(PromptTemplate(), TITLES, words({"Heat": 0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"item": "no title"}, r"template.item must contain \{title\} once, got 'no title'"),
        ({"answer": "{title}{title}"}, r"template.answer must contain \{title\} once"),
        ({"suffix": "Next: "}, r"template.suffix must not end in a blank, got 'Next: ': .* move it to the start of template.answer"),
        ({"separator": ", "}, r"template.separator must not end in a blank, .* start of template.item"),
        ({"prefix": "Seen:\t"}, "template.prefix must not end in a blank"),
        ({"item": "{title} "}, r"template.item must not end in a blank, .* start of template.separator and template.suffix"),
        ({"answer": "{title}\u00a0"}, "template.answer must not end in a blank, .*; remove it"),
        ({"candidates_prefix": "One of: "}, r"template.candidates_prefix must not end in a blank, .* start of template.candidate"),
        ({"candidate": "{title} "}, "template.candidate must not end in a blank"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**fields)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"unknown template 'poem'; choose one of \['chat', 'history', 'instruction'\] or give the fields"):
        PromptTemplate.named("poem")
