"""Answers written freely: where they end, which title they are, and which is nearest."""

from dataclasses import replace

import pytest
import torch
from tiny import EOS, TOKENS, batch_of, tiny_catalog, tiny_rows
from tiny_module import ready

from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.language.free_answers import named_items, nearest_items, texts, write_answers


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ([[4, 5, EOS, EOS]], [4, 5, EOS, -1, -1]),
        ([[EOS, EOS, EOS, EOS]], [EOS, -1, -1, -1, -1]),
        ([[4, 5, 6, 7]], [4, 5, 6, 7, EOS]),
        ([[4, 5, 6, EOS]], [4, 5, 6, EOS, -1]),
        ([[4, EOS]], [4, EOS, -1, -1, -1]),
    ],
    ids=["ended", "empty", "cut off", "ended with its last token", "all rows ended early"],
)
def test_every_answer_ends_once(monkeypatch, generated, expected):
    """Four tokens may be written: ended text keeps its end, text that is cut off gets one, and what fills up is -1."""
    monkeypatch.setattr("malleable.lightning_modules.language.free_answers.generate_text", lambda *args, **kwargs: torch.tensor(generated))
    assert write_answers(None, batch_of(tiny_rows(1)), tiny_catalog(), max_new_tokens=4).tolist() == [expected]


@torch.no_grad()
def test_the_most_probable_tokens_are_written():
    """Against a plain loop over one row at a time."""
    module, rows = ready(), tiny_rows(5)
    found = texts(write_answers(module.model, batch_of(rows), module.catalog, max_new_tokens=6))
    for row, answer in zip(rows, found, strict=True):
        tokens = list(row["prompt"])
        for _ in range(6):
            tokens.append(int(module.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == EOS:
                break
        expected = tokens[len(row["prompt"]) :]
        assert answer == expected + [EOS] * (expected[-1] != EOS)


def test_only_complete_titles_are_items():
    """`Alien` begins `Aliens`; neither a part of a title nor one with more behind it is that title."""
    tokens = torch.tensor([[4, 5, EOS, -1], [4, 5, 6, EOS], [4, EOS, -1, -1], [7, 7, EOS, -1], [7, EOS, -1, -1], [EOS, -1, -1, -1]])
    assert named_items(tokens, tiny_catalog()).tolist() == [[0], [1], [-1], [-1], [2], [-1]]


def test_equal_titles_give_the_first_item():
    twins = replace(tiny_catalog(), titles=("Alien", "Alien"), token_ids=((4, EOS), (4, EOS)))
    assert named_items(torch.tensor([[4, EOS, -1]]), twins).tolist() == [[0]]


@torch.no_grad()
def test_nearest_items_by_plain_distances():
    model = ready().model
    titles = embed_texts(model, TOKENS)
    tokens = torch.tensor([[4, 5, 6, EOS, -1], [9, 9, 9, 9, EOS], [EOS, -1, -1, -1, -1]])
    found = nearest_items(model, tokens, titles, k=8)
    for row, items, scores in zip([[4, 5, 6, EOS], [9, 9, 9, 9, EOS], [EOS]], found.item_ids.tolist(), found.scores, strict=True):
        state = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
        distances = torch.stack([(state - title).norm() for title in titles])
        assert items == distances.argsort().tolist()
        torch.testing.assert_close(scores, -distances.sort().values, atol=1e-2, rtol=0)
    assert found.item_ids[0, 0] == 1
    others = nearest_items(model, tokens, titles, k=8, allowed=torch.arange(8) != 1)
    assert others.item_ids[0].tolist() == [*found.item_ids[0, 1:].tolist(), -1]
