import json
import shutil
from pathlib import Path

import pytest
import small_shop
from shared import shared_data
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, ProphetNetTokenizer

from malleable.datamodules import Countries
from malleable.datamodules.editing.datamodule import EditingDataModule
from malleable.datamodules.language import tokenizer as module
from malleable.datamodules.language.tokenizer import (
    fingerprint,
    largest_token_id,
    load_tokenizer,
    pack_tokenizer,
    rules_digest,
    tokenizer_digest,
    train_tokenizer,
    unpack_tokenizer,
    write_from_memory,
)

TITLES = ["Toy Story (1995)", "Heat (1995)", "Á köldum klaka (Cold Fever) (1994)", "Star Wars (1977)", "Star Trek (1979)"] * 3


def test_a_trained_tokenizer_round_trips_any_text():
    tokenizer = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    for text in [*TITLES, " unseen Ω 漢字\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_come_first_and_are_recognised_in_text():
    tokenizer = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("Heat</s>Heat")["input_ids"].count(1) == 1
    assert len(tokenizer) <= 300


def test_training_is_repeatable_and_cached(cache, monkeypatch):
    folder = train_tokenizer(TITLES, 300)
    first = (folder / "tokenizer.json").read_bytes()
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(TITLES[::-1], 300) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
    assert train_tokenizer(TITLES, 310) != folder
    monkeypatch.setenv("MALLEABLE_CACHE", str(cache / "other"))
    assert (train_tokenizer(TITLES, 300) / "tokenizer.json").read_bytes() == first
    assert [path.name for path in cache.rglob("*.tmp")] == []


def test_temporary_folder_of_a_killed_process_is_removed(cache):
    folder = train_tokenizer(TITLES, 300)
    left = folder.with_name(f".{folder.name}.xyz.tmp")
    left.mkdir()
    assert train_tokenizer(TITLES, 300) == folder
    assert not left.exists()


@pytest.mark.parametrize("damage", [lambda text: text.replace('"t"', '"q"', 1), lambda text: text[:100], lambda text: None])
def test_a_damaged_cached_tokenizer_is_logged_and_trained_again(cache, caplog, damage):
    folder = train_tokenizer(TITLES, 300)
    file = folder / "tokenizer.json"
    whole = file.read_text()
    if (changed := damage(whole)) is None:
        file.unlink()
    else:
        assert changed != whole
        file.write_text(changed)
    with pytest.raises(OSError, match=rf"the cached tokenizer {folder} is corrupt \(tokenizer.json\); remove this folder"):
        load_tokenizer(str(folder))
    assert train_tokenizer(TITLES, 300) == folder
    assert f"the cached tokenizer {folder} is corrupt (tokenizer.json): creating it again" in caplog.text
    assert file.read_text() == whole


def test_a_stored_tokenizer_that_was_damaged_is_written_again(cache):
    packed = pack_tokenizer(str(train_tokenizer(TITLES, 300)))
    folder = unpack_tokenizer(packed)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:50])
    assert unpack_tokenizer(packed) == folder
    assert (folder / "tokenizer.json").read_bytes() == whole


def test_a_tokenizer_that_is_removed_during_a_run_is_stored_from_memory(cache, tmp_path):
    folder = train_tokenizer(TITLES, 300)
    before = pack_tokenizer(str(folder))
    shutil.rmtree(folder)
    after = pack_tokenizer(str(folder))
    assert after["digest"] == before["digest"]
    assert write_from_memory(str(folder), tmp_path / "copy")
    assert tokenizer_digest(str(tmp_path / "copy")) == before["digest"]
    assert not write_from_memory("unknown", tmp_path / "other")


def test_a_vocabulary_too_small_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match=r"vocab_size must be >= 259 .*, got 258"):
        train_tokenizer(TITLES, 258)


def test_a_second_writer_keeps_the_tokenizer_of_the_first(tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    module._save(tokenizer, folder)
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    module._save(tokenizer, folder)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_tokenizer_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("read-only")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="read-only"):
        train_tokenizer(TITLES, 300)


def test_popular_titles_get_tokens_of_their_own():
    counts = [50, *[0] * (len(TITLES) - 1)]
    plain, weighted = (load_tokenizer(str(train_tokenizer(TITLES, 275, counts))) for counts in (None, counts))
    assert len(weighted(TITLES[0])["input_ids"]) < len(plain(TITLES[0])["input_ids"])


def test_a_missing_padding_token_is_the_end_of_sequence_token(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 1


def test_an_unknown_name_is_an_error():
    with pytest.raises(OSError, match=r"cannot load the tokenizer 'nobody/nothing': .*HF_HUB_OFFLINE is set.*hf download nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_the_fingerprint_follows_the_content(tmp_path):
    folder = train_tokenizer(TITLES, 300)
    before = fingerprint(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra": 1}))
    assert fingerprint(str(folder)) != before
    assert fingerprint("org/one") != fingerprint("org/two")


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/rag.jinja", "added_tokens.json", "spiece.model"])
def test_the_fingerprint_is_of_every_file_that_changes_a_prompt(tmp_path, file):
    folder = shutil.copytree(train_tokenizer(TITLES, 300), tmp_path / "tokenizer")
    found = [fingerprint(str(folder))]
    (folder / file).parent.mkdir(exist_ok=True)
    for text in ("one", "other"):
        (folder / file).write_text(text)
        found.append(fingerprint(str(folder)))
    assert len(set(found)) == 3


def test_the_fingerprint_of_a_hub_id_is_of_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "hub_snapshot", lambda name: tmp_path / "first")
    first = fingerprint("org/one")
    monkeypatch.setattr(module, "hub_snapshot", lambda name: tmp_path / "second")
    assert fingerprint("org/one") != first


@pytest.mark.parametrize(
    "change",
    [
        lambda rules: rules | {"normalizer": {"type": "Lowercase"}},
        lambda rules: rules | {"pre_tokenizer": rules["pre_tokenizer"] | {"add_prefix_space": True}},
        lambda rules: rules | {"added_tokens": [token | {"lstrip": True} for token in rules["added_tokens"]]},
        lambda rules: rules | {"model": rules["model"] | {"merges": rules["model"]["merges"][::-1]}},
    ],
)
def test_the_digest_is_of_every_rule(tmp_path, change):
    """Tokenizers of equal size and equal special tokens."""
    folder = shutil.copytree(train_tokenizer(TITLES, 300), tmp_path / "tokenizer")
    before, rules = tokenizer_digest(str(folder)), json.loads((folder / "tokenizer.json").read_text())
    assert change(rules) != rules
    (folder / "tokenizer.json").write_text(json.dumps(change(rules)))
    assert before is not None
    assert tokenizer_digest(str(folder)) not in (before, None)


def test_the_digest_is_of_options_outside_the_rules(tmp_path):
    tokenizer = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    before = rules_digest(tokenizer)
    tokenizer.split_special_tokens = True
    assert rules_digest(tokenizer) != before
    words = tmp_path / "prophetnet.tokenizer"  # a tokenizer whose rules are written in Python
    words.write_text("\n".join(["[PAD]", "[UNK]", "[SEP]", "[X_SEP]", "[CLS]", "[MASK]", "Heat", "heat"]))
    cased, folded = (ProphetNetTokenizer(str(words), do_lower_case=folds) for folds in (False, True))
    assert cased("Heat")["input_ids"] != folded("Heat")["input_ids"]
    assert rules_digest(cased) != rules_digest(folded)
    cased.save_pretrained(tmp_path / "saved")
    assert rules_digest(ProphetNetTokenizer.from_pretrained(tmp_path / "saved")) == rules_digest(cased)


def test_a_gguf_tokenizer_is_converted_once(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    original = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    load = AutoTokenizer.from_pretrained
    reads = []

    def from_pretrained(folder: str, **options: object) -> object:
        if options.get("gguf_file"):
            reads.append((folder, options["gguf_file"]))
            return original
        return load(folder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    for _ in range(2):
        assert load_tokenizer(str(gguf))("Heat")["input_ids"] == original("Heat")["input_ids"]
    assert reads == [(str(tmp_path), "model.gguf")]


def test_a_real_llama_tokenizer_loads():
    tokenizer = load_tokenizer(str(shared_data("models/stories260k")))
    assert len(tokenizer) == 512
    assert tokenizer.pad_token_id is not None


def test_the_largest_token_of_texts_and_of_the_special_ones(tmp_path):
    tokenizer = load_tokenizer(str(train_tokenizer(TITLES, 300)))
    tokenizer.add_tokens(["<image>"])
    size = len(tokenizer)
    assert largest_token_id(tokenizer, ["Heat", ""]) == max(tokenizer("Heat")["input_ids"]) < size - 1
    assert largest_token_id(tokenizer, ["Heat", "an <image>"]) == size - 1
    tokenizer.pad_token = "<image>"
    assert largest_token_id(tokenizer, []) == size - 1


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("kind", ["recommendation", "editing"])
def test_data_modules_pass_local_files_only(kind, local, tmp_path, monkeypatch):
    """As models do; what is stored of the tokenizer is then read from the machine."""
    folder, asked = str(train_tokenizer(TITLES, 300)), []

    def from_pretrained(name, local_files_only, trust_remote_code):
        asked.append(local_files_only)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    options = {"tokenizer": f"org/{kind}-{local}", "local_files_only": local}
    if kind == "recommendation":
        data = small_shop.shop(tmp_path, cache_dir=str(tmp_path / "cache"), **options)
    else:
        data = EditingDataModule(Countries(relations=["continent"], limit=5), pack_length=64, **options)
    data.prepare_data()
    data.setup("fit")
    assert set(asked) == {local}
    assert tokenizer_digest(options["tokenizer"]) is not None
    assert asked[-1] is True


@pytest.mark.parametrize("name", ["Strange", "PreTrainedTokenizerFast"])
def test_code_of_a_repository_is_not_run(tmp_path, name):
    shutil.copytree(train_tokenizer(TITLES, 300), tmp_path / "t")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    strange = config | {"tokenizer_class": name, "auto_map": {"AutoTokenizer": ["code.Strange", "code.Strange"]}}
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(strange))
    (tmp_path / "t/code.py").write_text("from pathlib import Path\n\nPath('ran').touch()\nraise SystemExit('code was run')\n")
    if name == "Strange":
        with pytest.raises(OSError, match=r"needs code from its repository, which is not run"):
            load_tokenizer(str(tmp_path / "t"))
    else:
        assert load_tokenizer(str(tmp_path / "t"))("a")["input_ids"]
    assert not Path("ran").exists()
