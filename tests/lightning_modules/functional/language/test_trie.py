import pytest
import torch

from malleable.lightning_modules.functional.language.trie import Trie

# Alien = 5 1, Aliens = 5 6 1, Heat = 7 8 1
ALIEN = [[7, 8, 1], [5, 1], [5, 6, 1]]


def test_tables_of_a_small_tree():
    trie = Trie.build(ALIEN)
    # level by level: root | 5 7 | 1 6 8 | 1 1
    assert trie.token.tolist() == [0, 5, 7, 1, 6, 8, 1, 1]
    assert trie.num_children.tolist() == [2, 2, 1, 0, 1, 1, 0, 0]
    assert [trie.first_child[node].item() for node in (0, 1, 2, 4, 5)] == [1, 3, 5, 6, 7]
    # leaves in depth-first order: Alien, Aliens, Heat
    assert trie.item_leaf.tolist() == [2, 0, 1]
    assert trie.first_leaf.tolist() == [0, 0, 2, 0, 1, 2, 1, 2]
    assert trie.last_leaf.tolist() == [3, 2, 3, 1, 2, 3, 2, 3]
    assert (len(trie), trie.max_length, trie.max_token) == (3, 3, 8)
    assert [trie.title_token[start : start + length].tolist() for start, length in zip(trie.title_start, trie.title_length, strict=True)] == [
        [5, 1],
        [5, 6, 1],
        [7, 8, 1],
    ]


def test_items_with_equal_titles_share_a_leaf(caplog):
    trie = Trie.build([[4, 1], [5, 1], [4, 1], [4, 1]])
    assert trie.item_leaf.tolist() == [0, 1, 0, 0]
    assert trie.duplicates == ((0, 2, 3),)
    assert "1 titles belong to several items each (e.g. items [0, 2, 3])" in caplog.text
    leaf = torch.tensor([[0, 1]])
    assert trie.restrict().item(leaf).tolist() == [[0, 1]]
    assert trie.restrict(torch.tensor([False, True, False, True])).item(leaf).tolist() == [[3, 1]]


def test_counts_and_leaves_are_of_allowed_items_only():
    trie = Trie.build(ALIEN)
    view = trie.restrict(torch.tensor([[True, True, True], [True, False, True], [False, False, False]]))
    nodes = torch.tensor([[0, 1, 2]]).expand(3, -1)
    assert view.count(nodes).tolist() == [[3, 2, 1], [2, 1, 1], [0, 0, 0]]
    assert view.leaf(nodes)[:2].tolist() == [[0, 0, 2], [1, 1, 2]]
    assert view.select(torch.tensor([1])).count(nodes[:1]).tolist() == [[2, 1, 1]]
    everything = trie.restrict()
    assert everything.select(torch.tensor([1, 2])) is everything


def test_children_are_concatenated():
    view = Trie.build(ALIEN).restrict(torch.tensor([[True, True, True], [True, False, True]]))
    node = torch.tensor([[1, 0, 2], [1, 2, 0]])
    live = torch.tensor([[True, False, True], [True, True, False]])
    candidates = view.expand(node, live, 3)
    assert candidates.beam.tolist() == [[0, 0, 2], [0, 0, 1]]
    assert candidates.node.tolist() == [[3, 4, 5], [3, 4, 5]]
    assert candidates.valid.tolist() == [[True, True, True], [False, True, True]]
    assert view.expand(node, live, 4).valid[:, 3].tolist() == [False, False]


def test_the_tables_of_a_large_tree_agree_with_the_titles():
    generator = torch.Generator().manual_seed(0)
    titles = [[*torch.randint(2, 6, (int(n),), generator=generator).tolist(), 1] for n in torch.randint(1, 6, (300,), generator=generator)]
    trie = Trie.build(titles)
    for item, title in enumerate(titles):
        node = 0
        for token in title:
            first = int(trie.first_child[node])
            (child,) = [child for child in range(first, first + int(trie.num_children[node])) if trie.token[child] == token]
            assert trie.first_leaf[child] <= trie.item_leaf[item] < trie.last_leaf[child]
            node = child
        assert trie.num_children[node] == 0
    assert int((trie.num_children == 0).sum()) == len({tuple(title) for title in titles}) == len(trie.title_start)


def test_moving_keeps_all_fields():
    trie = Trie.build(ALIEN)
    moved = trie.to("cpu")
    assert torch.equal(moved.token, trie.token)
    assert moved.max_length == 3


def test_bad_catalogues_are_refused():
    with pytest.raises(ValueError, match="empty catalogue"):
        Trie.build([])
    with pytest.raises(ValueError, match="item 1 has no tokens"):
        Trie.build([[3, 1], []])
    with pytest.raises(ValueError, match="item 1 is a prefix of the title of item 0; end every title with the end-of-sequence token"):
        Trie.build([[3, 4], [3]])


@pytest.mark.parametrize("allowed", [torch.ones(2, dtype=torch.bool), torch.ones(3), torch.ones(1, 1, 3, dtype=torch.bool)])
def test_bad_filters_are_refused(allowed):
    with pytest.raises(ValueError, match=r"allowed must be a boolean tensor of shape \(3,\) or \(B, 3\)"):
        Trie.build(ALIEN).restrict(allowed)


def test_one_filter_for_all_rows_is_not_copied_for_each(monkeypatch):
    view = Trie.build(ALIEN).restrict(torch.tensor([True, False, True]))
    node = torch.zeros(4, 1, dtype=torch.long)
    expected = view.leaf(node)
    boundaries = []
    search = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda first, *args, **options: boundaries.append(first.numel()) or search(first, *args, **options))
    assert torch.equal(view.leaf(node), expected)
    assert boundaries == [4]
