"""Prompts under the chat templates of the usual kinds, equal to the whole text tokenised at once."""

import itertools
from dataclasses import replace

import pytest
from chat_templates import CHATML, TEMPLATES, chat_tokenizer
from transformers import AutoTokenizer

from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.recommendation.prompt import PromptTemplate, tokenize
from malleable.datamodules.sources.recommendation.synthetic import Synthetic

TITLES = ["Alien (1979)", "Heat", "七人の侍", "M*A*S*H", '"Crocodile" Dundee', "$9.99"]


def tokenizer_of(kind: str):
    return chat_tokenizer(kind, TITLES)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_pieces_equal_the_whole_text(kind):
    tokenizer = tokenizer_of(kind)
    template = PromptTemplate.named("chat")
    pieces = tokenize(template, TITLES, tokenizer)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[kind][1])
    assert pieces.eos_token_id == end
    for history, target in itertools.product([(0,), (1, 2), (3, 4, 5)], range(len(TITLES))):
        messages = [{"role": "user", "content": template.text([TITLES[item] for item in history])}]
        messages.append({"role": "assistant", "content": TITLES[target]})
        # The blank that Llama 2 has after a reply is left out.
        text = tokenizer.apply_chat_template(messages, tokenize=False).replace(" </s>", "</s>")
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = [*pieces.prompt(history), *pieces.answers[target]]
        # After the end of the turn templates may put a line break.
        assert found == whole[: len(found)], tokenizer.decode(found)
        assert len(whole) - len(found) <= 1
        assert found[-1] == end


def test_candidates_and_a_system_message_are_part_of_the_prompt():
    tokenizer = tokenizer_of("chatml")
    pieces = tokenize(PromptTemplate(chat=True, system="You know films."), TITLES, tokenizer)
    assert tokenizer.decode(pieces.prompt([0], [1, 2])) == (
        '<|im_start|>system\nYou know films.<|im_end|>\n<|im_start|>user\nI enjoyed, in this order:\n"Alien (1979)"\nChoose one of:\n"Heat"\n'
        '"七人の侍"\nWhat will I enjoy next? Answer with the title only.<|im_end|>\n<|im_start|>assistant\n'
    )
    assert tokenizer.decode(pieces.document([0, 1])).endswith('"Heat"\n<|im_end|>')


def test_unsupported_chat_templates_are_an_error():
    tokenizer = tokenizer_of("gemma")
    with pytest.raises(ValueError, match=r"rejects messages of system, user: System role not supported; set or omit template.system"):
        tokenize(PromptTemplate(chat=True, system="Be brief."), TITLES, tokenizer)
    with pytest.raises(ValueError, match=r"changes the text of a message"):
        tokenize(replace(PromptTemplate.named("chat"), prefix="\n\nFilms:\n"), TITLES, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template, so template 'chat' cannot be used"):
        tokenize(PromptTemplate.named("chat"), TITLES, tokenizer)
    with pytest.raises(ValueError, match=r"template.system is a message of a chat"):
        PromptTemplate(system="Be brief.")


def test_rows_of_a_chat(tmp_path):
    """Prompts, packed rows and the catalogue end where the chat template ends a turn."""
    tokenizer_of("chatml").save_pretrained(tmp_path)
    for view in ("answer", "packed"):
        data = RecommendationDataModule(Synthetic(), tokenizer=str(tmp_path), template="chat", train_view=view, batch_size=2)
        data.prepare_data()
        data.setup("fit")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert data.catalog.vocabulary.eos_token_id == end
        assert all(ids[-1] == end for ids in data.catalog.token_ids)
        row = data.train_dataset[0]
        ids = row["prompt"] if view == "answer" else row["input_ids"]
        assert tokenizer.decode(ids).startswith("<|im_start|>user\nI enjoyed, in this order:\n")


def test_a_date_in_a_chat_template_does_not_change_with_the_day():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    pieces = tokenize(PromptTemplate.named("chat"), TITLES, tokenizer)
    assert tokenizer.decode(pieces.prefix).startswith("26 Jul 2024\n")
