import json
import sys

import pytest
import torch

from malleable import ItemIndex
from malleable.datamodules.files.sealed import MANIFEST
from malleable.lightning_modules.functional.search.nearest import nearest

COUNT, WIDTH = 60, 8
INFINITE = torch.ones(COUNT, 2).index_fill(0, torch.tensor(4), torch.inf)
METRICS = "cosine", "dot", "l2"


@pytest.fixture
def embeddings():
    return torch.randn(COUNT, WIDTH)


@pytest.fixture
def queries():
    return torch.randn(5, WIDTH)


def names(count=COUNT):
    return [f"item {number}" for number in range(count)]


def same(found, expected):
    assert torch.equal(found.positions, expected.positions)
    assert found.ids == expected.ids
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_finds_the_nearest_items(embeddings, queries, metric):
    found = ItemIndex(embeddings, names(), metric).search(queries, 4)
    expected = nearest(queries, embeddings, 4, metric=metric)
    assert torch.equal(found.positions, expected.items)
    assert torch.equal(found.scores, expected.scores)
    assert found.ids == [[f"item {position}" for position in row] for row in expected.items.tolist()]


def test_ids_are_positions_by_default(embeddings, queries):
    index = ItemIndex(embeddings)
    assert len(index) == COUNT
    found = index.search(queries, 3)
    assert found.ids == found.positions.tolist()


def test_filtered_and_excluded_items_are_not_returned(embeddings, queries):
    index = ItemIndex(embeddings, names())
    whole = index.search(queries, COUNT).ids
    excluded = [row[: 2 * number] for number, row in enumerate(whole)]
    found = index.search(queries, 3, exclude_ids=excluded).ids
    assert found == [row[2 * number :][:3] for number, row in enumerate(whole)]
    mask = torch.arange(COUNT) % 3 == 0
    found = index.search(queries, COUNT, filter_mask=mask)
    assert found.ids == [[id for id in row if int(id.split()[1]) % 3 == 0] for row in whole]
    assert (found.positions[:, 20:] == -1).all()
    assert (found.scores[:, 20:] == -torch.inf).all()
    each = mask.expand(5, COUNT).clone()
    each[2] = False
    assert [len(row) for row in index.search(queries, 4, each, exclude_ids=[[]] * 5).ids] == [4, 4, 0, 4, 4]


@pytest.mark.parametrize("scale", [1e-25, 0.5, 1e20])
def test_the_length_of_embeddings_does_not_change_cosines(embeddings, queries, scale):
    found, expected = ItemIndex(embeddings * scale).search(queries * 3, 10), ItemIndex(embeddings).search(queries, 10)
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_later_changes_of_the_embeddings_do_not_change_the_index(embeddings, queries, metric):
    index = ItemIndex(embeddings, metric=metric)
    before = index.search(queries, 3)
    embeddings.zero_()
    same(index.search(queries, 3), before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("ids", "titles"), [(names(), [f"Ein Lied für {name}" for name in names()]), (list(range(5, 5 + COUNT)), None)])
def test_a_saved_index_is_the_same(tmp_path, embeddings, queries, metric, ids, titles):
    index = ItemIndex(embeddings, ids, metric, titles)
    index.save(tmp_path / "index")
    loaded = ItemIndex.load(tmp_path / "index")
    assert (loaded.ids, loaded.titles, loaded.metric, loaded.fingerprint) == (ids, titles, metric, index.fingerprint)
    assert torch.equal(loaded.embeddings, index.embeddings)
    same(loaded.search(queries, 7), index.search(queries, 7))
    assert json.loads((tmp_path / "index" / MANIFEST).read_text())["fingerprint"] == index.fingerprint


def test_an_index_replaces_an_index_only(tmp_path, embeddings):
    folder = tmp_path / "index"
    ItemIndex(embeddings).save(folder)
    ItemIndex(embeddings[:3]).save(folder)
    assert len(ItemIndex.load(folder)) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="mine exists and is not an item index; give a new folder"):
        ItemIndex(embeddings).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("file", ["embeddings.safetensors", "items.json", MANIFEST])
def test_a_damaged_index_is_refused(tmp_path, embeddings, file):
    folder = ItemIndex(embeddings, names()).save(tmp_path / "index")
    data = bytearray((folder / file).read_bytes())
    data[-5] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError, match=r"the item index .*index is (corrupt|incomplete) \(.*\); build the index again, or copy it again"):
        ItemIndex.load(folder)
    if file != MANIFEST:
        (folder / file).unlink()
        with pytest.raises(ValueError, match=rf"the item index .*index is corrupt \({file}\)"):
            ItemIndex.load(folder)


def test_another_folder_is_not_an_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not an item index: it has no manifest\.json"):
        ItemIndex.load(tmp_path / "nowhere")


def test_the_fingerprint_depends_on_all_content(embeddings):
    changed = embeddings.clone()
    changed[3, 2] += 1e-3
    titles = names()
    indices = [
        ItemIndex(embeddings),
        ItemIndex(embeddings, metric="dot"),
        ItemIndex(embeddings, list(reversed(range(COUNT)))),
        ItemIndex(embeddings, [str(number) for number in range(COUNT)]),
        ItemIndex(embeddings, titles=titles),
        ItemIndex(changed),
    ]
    assert len({index.fingerprint for index in indices}) == len(indices)
    assert ItemIndex(embeddings.clone()).fingerprint == indices[0].fingerprint


WRONG = {
    "metric must be one of dot, cosine, l2; got 'angle'": {"metric": "angle"},
    "backend must be one of torch, faiss; got 'annoy'": {"backend": "annoy"},
    r"embeddings must be floating-point numbers of shape \(N, d\), got torch.int64": {"embeddings": torch.ones(COUNT, 2, dtype=torch.long)},
    "ids must have one entry for each of the 60 embeddings, got 2": {"ids": ["a", "b"]},
    "titles must have one entry for each of the 60 embeddings, got 1": {"titles": ["a"]},
    "ids must be distinct, but 'item 0' is at positions 0 and 59; leave one out": {"ids": [*names(COUNT - 1), "item 0"]},
    "ids must be strings or integers, but the id at position 59 is 0.5": {"ids": [*names(COUNT - 1), 0.5]},
    "titles must be strings, but the title at position 0 is None": {"titles": [None] * COUNT},
    r"the embedding of item 4 \(position 4\) is not finite; leave the item out": {"embeddings": INFINITE},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_content_is_refused(embeddings, message):
    with pytest.raises(ValueError, match=message):
        ItemIndex(**{"embeddings": embeddings} | WRONG[message])


WRONG_EXCLUDED = {
    "exclude_ids must have a list of ids for each of the 5 queries, got 1 lists": [["item 0"]],
    r"exclude_ids must have a list of ids for each query, but entry 0 is 'item 0'; give \['item 0'\]": ["item 0"] * 5,
    "exclude_ids, entry 1: 7 is not an id of this index, whose first id is 'item 0'; leave it out": [[], [7], [], [], []],
}


@pytest.mark.parametrize("message", WRONG_EXCLUDED)
def test_wrong_excluded_ids_are_refused(embeddings, queries, message):
    with pytest.raises(ValueError, match=message):
        ItemIndex(embeddings, names()).search(queries, 3, exclude_ids=WRONG_EXCLUDED[message])


def test_the_backend_needs_its_package(embeddings, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"backend 'faiss' needs FAISS; run `pip install 'malleable\[search\]'`, or use backend 'torch'"):
        ItemIndex(embeddings, backend="faiss")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rounded", [False, True], ids=["random", "equal scores"])
def test_backends_find_the_same(tmp_path, metric, rounded):
    """Also where scores are equal, and where items are excluded."""
    pytest.importorskip("faiss")
    embeddings, queries = torch.randn(900, 6) + 5, torch.randn(30, 6) + 5
    if rounded:
        embeddings, queries = embeddings.round(), queries.round()
    ours = ItemIndex(embeddings, names(900), metric)
    theirs = ItemIndex.load(ours.save(tmp_path / "index"), backend="faiss")
    mask, excluded = torch.arange(900) % 2 > 0, [[f"item {number}"] for number in range(30)]
    for options in ({}, {"filter_mask": mask}, {"exclude_ids": excluded}, {"filter_mask": mask, "exclude_ids": excluded}):
        for k in (1, 10, 950):
            same(theirs.search(queries, k, **options), ours.search(queries, k, **options))
    with pytest.raises(ValueError, match="backend 'faiss' searches on a CPU only, not on meta; use backend 'torch'"):
        theirs.to("meta")
