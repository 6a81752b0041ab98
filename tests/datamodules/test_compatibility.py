"""What weights depend on travels with them: tokenizer, template, items and labels, and is compared."""

import shutil
from dataclasses import asdict

import pytest
import small_shop
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.batch import Catalog, KnowledgeGraph, Vocabulary
from malleable.datamodules.compatibility import check_identity, differences
from malleable.datamodules.language.tokenizer import load_tokenizer, pack_tokenizer, tokenizer_digest, train_tokenizer, unpack_tokenizer
from malleable.datamodules.recommendation.prompt import PromptTemplate
from malleable.datamodules.stored_identity import as_plain, from_plain, is_stored, read_stored, store_identity, vocabulary_of, write_folder


def prepared(data, stage="test"):
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that holds the catalogue of the small shop, and its data module."""
    data = prepared(small_shop.shop(tmp_path / "shop"))
    entries = {"state_dict": {}}
    store_identity(entries, "catalog", data.catalog)
    torch.save(entries, tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt"), data


# --- tokenizers ---


def test_a_packed_tokenizer_needs_no_files(tmp_path, cache, monkeypatch):
    folder = train_tokenizer(["Heat", "Jaws"], 300)
    packed, digest = pack_tokenizer(str(folder)), tokenizer_digest(str(folder))
    tokens = load_tokenizer(str(folder))("Heat & Jaws")["input_ids"]
    shutil.rmtree(cache)
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "elsewhere"))
    restored = unpack_tokenizer(packed)
    assert restored.is_relative_to(tmp_path / "elsewhere")
    assert load_tokenizer(str(restored))("Heat & Jaws")["input_ids"] == tokens
    assert packed["digest"] == digest == tokenizer_digest(str(restored))


def test_the_digest_depends_on_the_rules_of_a_tokenizer():
    first, other = (tokenizer_digest(str(train_tokenizer(titles, 300))) for titles in (["Heat", "Jaws"], ["Heat", "Jars and more jars"]))
    assert first != other


def test_a_damaged_tokenizer_is_refused(cache):
    packed = pack_tokenizer(str(train_tokenizer(["Heat"], 300)))
    other = pack_tokenizer(str(train_tokenizer(["Jars and more jars"] * 3, 300)))
    with pytest.raises(ValueError, match="the checkpoint's tokenizer is damaged"):
        unpack_tokenizer(packed | {"files": other["files"]})


def test_file_names_of_a_checkpoint_stay_in_its_folder(tmp_path, cache):
    packed = pack_tokenizer(str(train_tokenizer(["Heat"], 300)))
    packed["files"]["../../escaped"] = packed["files"]["tokenizer_config.json"]
    assert (unpack_tokenizer(packed) / "escaped").is_file()
    assert not list(tmp_path.glob("escaped"))


def test_a_tokenizer_that_cannot_be_read_is_logged(caplog):
    assert pack_tokenizer("nowhere/at/all") is None
    assert "'nowhere/at/all' cannot be read, so it is neither stored nor compared" in caplog.text


# --- comparison ---


def test_descriptions_are_restored_from_plain_data():
    catalog = Catalog(("A", "B"), ((1, 2), (3,)), ((), ("x",)), (1, 2), keys=("7", "8"), template={"prefix": "", "candidates_prefix": None})
    graph = KnowledgeGraph(("a", "b"), ("r",), (1, 2), (3,))
    for kind, described in (("catalog", catalog), ("vocabulary", Vocabulary(3, 1, 0, "folder")), ("graph", graph)):
        assert from_plain(kind, as_plain(described) | {"of a later version": 1}) == described


WORDS = Vocabulary(4)
A = Catalog(("A", "B", "C"), ((1,), (2,), (3,)), vocabulary=WORDS, template={"prefix": "x", "suffix": "y"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Catalog(("A", "C", "B"), ((1,), (3,), (2,)), vocabulary=WORDS), "in another order, first at position 1: 'B' in the checkpoint, 'C' here"),
        (
            Catalog(("A", "B", "D"), ((1,), (2,), (3,)), vocabulary=WORDS),
            r"items: 3 in the checkpoint, 3 here, 1 new \('D'\), 1 missing \('C'\)",
        ),
        (Catalog(("A", "B", "C"), ((1,), (2,), (9,)), vocabulary=WORDS), r"tokens of items: 'C' \[3\] in the checkpoint, \[9\] here"),
        (Catalog(("A", "B", "C"), ((1,), (2,), (3,)), vocabulary=Vocabulary(5)), "vocab_size 4 in the checkpoint, 5 here"),
        (
            Catalog(("A", "B", "C"), ((1,), (2,), (3,)), vocabulary=WORDS, template={"prefix": "x", "suffix": "z"}),
            "template: 'suffix' 'y' in the checkpoint, 'z' here",
        ),
    ],
)
def test_a_difference_names_both_values_and_the_remedy(given, message):
    with pytest.raises(MisconfigurationException, match=rf"trained on other data: .*{message}.*--data.tokenizer <checkpoint>.*--extend_catalog"):
        check_identity("catalog", A, given)


@pytest.mark.parametrize(
    ("stored", "given", "named"),
    [
        ({}, {"q_proj": 64}, "'q_proj' None in the checkpoint, 64 here"),
        ({"q_proj": 64}, {}, "'q_proj' 64 in the checkpoint, None here"),
        ({"theta": 1.0, "type": "linear"}, {"theta": 1.0}, "'type' 'linear' in the checkpoint, None here"),
    ],
)
def test_an_entry_that_is_missing_on_one_side_is_a_difference(stored, given, named):
    assert differences({"pattern": stored}, {"pattern": given}) == [f"pattern: {named}"]


def test_missing_entries_equal_default_values():
    """Versions of libraries differ in what they write out."""
    assert not differences({"rope": {"theta": 1.0}}, {"rope": {"theta": 1.0, "type": "default", "factor": None}})


def test_a_template_of_an_earlier_version_has_the_defaults():
    old = Catalog(("A",), ((1,),), vocabulary=WORDS, template={"prefix": "x"})
    check_identity("catalog", old, Catalog(("A",), ((1,),), vocabulary=WORDS, template=asdict(PromptTemplate(prefix="x"))))
    with pytest.raises(MisconfigurationException, match="template: 'chat' False in the checkpoint, True here"):
        check_identity("catalog", old, Catalog(("A",), ((1,),), vocabulary=WORDS, template={"prefix": "x", "chat": True}))


def test_counts_and_ids_may_differ():
    check_identity("catalog", A, Catalog(("A", "B", "C"), ((1,), (2,), (3,)), popularity=(5, 6, 7), vocabulary=WORDS, keys=("1", "2", "3")))


def test_appended_items_are_accepted_with_extend(caplog):
    longer = Catalog(("A", "B", "C", "D"), ((1,), (2,), (3,), (1, 2)), vocabulary=WORDS)
    with caplog.at_level("INFO"):
        check_identity("catalog", A, longer, extend=True, new_items="their counts are 0")
        check_identity("catalog", A, A, extend=True)
    assert caplog.messages == [
        "extend_catalog: 1 new item after the 3 items of the checkpoint: 'D'; their counts are 0",
        "extend_catalog: no item is new; the checkpoint has all 3 items",
    ]
    with pytest.raises(MisconfigurationException, match=r"1 new \('D'\)"):
        check_identity("catalog", A, longer)
    with pytest.raises(MisconfigurationException, match="'D'"):
        check_identity("catalog", A, Catalog(("D", "A", "B", "C"), ((1, 2), (1,), (2,), (3,)), vocabulary=WORDS), extend=True)


def test_counted_tables_depend_on_the_items_alone():
    check_identity("catalog", A, Catalog(("A", "B", "C"), vocabulary=Vocabulary(9)), text=False)


# --- data modules ---


@pytest.mark.parametrize("variant", [small_shop.reordered, small_shop.more_users, small_shop.fewer_items])
def test_data_takes_tokenizer_template_and_catalogue_of_a_checkpoint(checkpoint, variant, tmp_path):
    path, trained = checkpoint
    data = prepared(variant(tmp_path / "new", tokenizer=path))
    check_identity("catalog", trained.catalog, data.catalog)
    assert data.catalog.keys == trained.catalog.keys
    assert data.template == trained.template or data.catalog.template == trained.catalog.template
    assert tokenizer_digest(data.catalog.vocabulary.tokenizer) == tokenizer_digest(trained.catalog.vocabulary.tokenizer)
    titles = data.catalog.titles
    for row in (data.test_dataset[index] for index in range(len(data.test_dataset))):
        assert row["answers"] == [trained.catalog.token_ids[row["item_ids"][0]]]
        assert [titles[item] for item in row["seen"]] == [trained.catalog.titles[item] for item in row["seen"]]


def test_reordered_items_give_the_same_rows(checkpoint, tmp_path):
    path, trained = checkpoint
    data = prepared(small_shop.reordered(tmp_path / "new", tokenizer=path))
    assert [data.test_dataset[row] for row in range(16)] == [trained.test_dataset[row] for row in range(16)]


def test_items_that_are_not_in_the_data_keep_their_numbers(checkpoint, tmp_path):
    path, trained = checkpoint
    catalog = prepared(small_shop.fewer_items(tmp_path / "new", tokenizer=path)).catalog
    assert catalog.titles == trained.catalog.titles
    assert catalog.popularity[trained.catalog.keys.index("f1")] == 0


def test_new_items_are_counted_and_named(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(ValueError, match=r"2 items of the data are not in the catalogue of 12 .*'A Quiet Mirror' \(id n1\), .*--extend_catalog"):
        small_shop.more_items(tmp_path / "new", tokenizer=path).prepare_data()


def test_new_items_are_added_on_request(checkpoint, tmp_path):
    path, trained = checkpoint
    catalog = prepared(small_shop.more_items(tmp_path / "new", tokenizer=path, extend_catalog=True)).catalog
    assert catalog.titles == (*trained.catalog.titles, "A Quiet Mirror", "A Quiet Harbor")
    assert catalog.keys == (*trained.catalog.keys, "n1", "n2")
    check_identity("catalog", trained.catalog, catalog, extend=True)
    with pytest.raises(ValueError, match="extend_catalog needs a catalogue to extend"):
        small_shop.shop(tmp_path / "new", extend_catalog=True)


def test_a_renamed_item_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint
    items = small_shop.TITLES | {"f3": "Another Name"}
    with pytest.raises(ValueError, match=r"f3: 'The Broken River' in the checkpoint, 'Another Name' in the data.*stored titles, or new ids"):
        small_shop.shop(tmp_path / "new", items, tokenizer=path, extend_catalog=True).prepare_data()


def test_another_template_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(ValueError, match=r"template is .*enjoyed.* here, but .* in .*a.ckpt; omit template"):
        small_shop.shop(tmp_path / "new", tokenizer=path, template="instruction").prepare_data()


def test_an_exported_folder_gives_the_same(checkpoint, tmp_path):
    _, trained = checkpoint
    folder = tmp_path / "model"
    shutil.copytree(trained.catalog.vocabulary.tokenizer, folder)
    write_folder(folder, "catalog", trained.catalog, {})
    assert is_stored(str(folder))
    data = prepared(small_shop.reordered(tmp_path / "new", tokenizer=str(folder)))
    check_identity("catalog", trained.catalog, data.catalog)
    shutil.copy(train_tokenizer(["other", "titles"], 290) / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="differs from the one that its model was trained with"):
        read_stored(str(folder))


def test_an_earlier_checkpoint_without_its_tokenizer(checkpoint, tmp_path, cache, monkeypatch):
    path, _ = checkpoint
    entries = torch.load(path, weights_only=True)
    entries.pop("tokenizer")
    torch.save(entries, path)
    assert vocabulary_of(read_stored(path)).tokenizer is not None  # it is still on this machine
    shutil.rmtree(cache)
    monkeypatch.setattr("malleable.datamodules.language.tokenizer._CONTENTS", {})  # as in another process
    with pytest.raises(ValueError, match="written by an earlier version, without its tokenizer"):
        read_stored(path)


def test_files_that_are_not_checkpoints(tmp_path):
    (tmp_path / "a.ckpt").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_stored(str(tmp_path / "a.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="contains neither a catalogue nor a vocabulary"):
        read_stored(str(tmp_path / "b.ckpt"))
