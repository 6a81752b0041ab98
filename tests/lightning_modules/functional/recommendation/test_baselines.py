import torch

from malleable.lightning_modules.functional.recommendation.baselines import (
    cosine_similarity,
    count_items,
    count_pairs,
    neighbour_scores,
    top_items,
    transition_scores,
)


def test_counts_skip_padding_and_add_repeats():
    counts = torch.zeros(4, dtype=torch.int32)
    count_items(counts, torch.tensor([[1, 1, -1], [3, -1, -1]]))
    count_items(counts, torch.tensor([], dtype=torch.long))
    assert counts.tolist() == [0, 2, 0, 1]


def test_pairs_broadcast_and_skip_padding():
    table = torch.zeros(3, 3, dtype=torch.int32)
    count_pairs(table, torch.tensor([[0, 1], [0, -1]]), torch.tensor([[2], [2]]))
    count_pairs(table, torch.tensor([0, 0]), torch.tensor([1, -1]))
    assert table.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]


def test_cosine_similarity_equals_that_of_user_vectors():
    users = [[0, 1, 2], [2, 1], [3, 0], [1]]
    vectors = torch.zeros(5, len(users))
    pairs, counts = torch.zeros(5, 5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    for user, items in enumerate(users):
        vectors[items, user] = 1
        count_items(counts, torch.tensor(items))
        for place, item in enumerate(items):
            count_pairs(pairs, torch.tensor(items[:place], dtype=torch.long), torch.tensor([item]))
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2).fill_diagonal_(0)
    torch.testing.assert_close(cosine_similarity(pairs, counts), expected)


def test_neighbours_of_the_last_items_only():
    similarity = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    history = torch.tensor([[2, 0, 1], [-1, -1, 2], [-1, -1, -1]])
    assert neighbour_scores(similarity, history, last=2).tolist() == [[1, 1, 6], [2, 4, 0], [0, 0, 0]]
    assert neighbour_scores(similarity, history[:, :0]).tolist() == [[0, 0, 0]] * 3


def test_transitions_of_the_last_item():
    transitions = torch.tensor([[0, 3], [1, 0]], dtype=torch.int32)
    assert transition_scores(transitions, torch.tensor([[1, 0], [-1, 1], [-1, -1]])).tolist() == [[0, 3], [1, 0], [0, 0]]
    assert transition_scores(transitions, torch.empty(1, 0, dtype=torch.long)).tolist() == [[0, 0]]


def test_top_items_break_ties_by_id_and_pad():
    scores = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    items, values = top_items(scores, 3)
    assert items.tolist() == [[1, 2, 0]]
    assert values.tolist() == [[5, 5, 1]]
    allowed = torch.tensor([[False, True, False, True]])
    items, values = top_items(scores, 6, allowed)
    assert items.tolist() == [[1, 3, -1, -1, -1, -1]]
    assert values.tolist() == [[5, 0] + [float("-inf")] * 4]
