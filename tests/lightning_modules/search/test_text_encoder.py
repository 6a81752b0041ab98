import logging
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, T5Config, T5Model

from malleable import TextEncoder
from malleable.datamodules.files.fetch import MINILM, MINILM_FILES
from malleable.lightning_modules.search.text_encoder import pool

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "shoe", "lamp", "for", "a", "desk", "child")
TEXTS = ["red shoe", "a blue lamp for a desk", "shoe for a child", "lamp", "blue shoe for a red child for a desk lamp"]
# Where a user's own cache is; tests have another one.
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "malleable"


def save_encoder(folder, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **sizes | options)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("bert"))


def encoder(name, **options):
    return TextEncoder(name, **{"device": "cpu", **options})


def one_by_one(name, pooling, normalize):
    model, tokenizer = BertModel.from_pretrained(name).eval(), BertTokenizerFast.from_pretrained(name)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        row = states.mean(0) if pooling == "mean" else states[0]
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_embeddings_equal_those_of_single_texts(bert, pooling, normalize, batch_size):
    found = encoder(bert, pooling=pooling, normalize=normalize, batch_size=batch_size).encode(TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(bert, pooling, normalize), atol=1e-5, rtol=1e-4)


def test_pooling_ignores_padding():
    states = torch.arange(12.0).reshape(2, 3, 2)
    states[1, 1:] = torch.nan
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert pool(states, mask, "mean").tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert pool(states, mask, "cls").tolist() == [[0.0, 1.0], [6.0, 7.0]]


def test_long_texts_are_cut(bert):
    """At the given length, and at that of the model."""
    short = encoder(bert, max_length=4, normalize=False)
    torch.testing.assert_close(short.encode(["red shoe for a child"]), short.encode(["red shoe"]))
    whole = encoder(bert, normalize=False)
    torch.testing.assert_close(whole.encode(["red " * 100]), whole.encode(["red " * 30]))


def test_autocast_has_no_effect(bert):
    expected = encoder(bert).encode(TEXTS, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(bert).encode(TEXTS, use_cache=False), expected)


def test_bfloat16_is_close_to_float32(bert):
    half, full = encoder(bert, dtype="bfloat16").encode(TEXTS), encoder(bert).encode(TEXTS)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert ((half * full).sum(1) > 0.99).all()


def test_no_texts(bert):
    assert encoder(bert).encode([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red", " \n"], "text 1 is empty and cannot be embedded; leave it out"),
        (["red", "shoe", None], "text 2 is None, not a string and cannot be embedded"),
        ("red", r"texts must be a list of texts, got the text 'red'; give \[text\]"),
    ],
)
def test_wrong_texts_are_refused(bert, texts, message):
    with pytest.raises(ValueError, match=message):
        encoder(bert).encode(texts)


def test_embeddings_are_stored(bert, tmp_path, monkeypatch):
    first = encoder(bert, cache_dir=tmp_path).encode(TEXTS)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    again = encoder(bert, cache_dir=tmp_path, batch_size=2)
    monkeypatch.setattr(again, "_encode", lambda tokens: pytest.fail("computed again"))
    assert torch.equal(again.encode(TEXTS), first)


def test_embeddings_are_stored_in_the_cache_folder_by_default(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path))
    encoder(bert).encode(TEXTS, use_cache=False)
    assert not (tmp_path / "embeddings").exists()
    encoder(bert).encode(TEXTS)
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


def test_stored_embeddings_depend_on_weights_settings_and_texts(bert, tmp_path):
    names = set()
    other, deeper = save_encoder(tmp_path / "other", seed=1), save_encoder(tmp_path / "gelu", hidden_act="relu")
    cases = [(bert, {}, TEXTS), (other, {}, TEXTS), (deeper, {}, TEXTS), (bert, {}, TEXTS[::-1]), (bert, {"max_length": 4}, TEXTS)]
    cases += [(bert, options, TEXTS) for options in ({"pooling": "cls"}, {"normalize": False}, {"dtype": "bfloat16"})]
    for number, (name, options, texts) in enumerate(cases, start=1):
        encoder(name, cache_dir=tmp_path / "cache", **options).encode(texts)
        names = {file.name for file in (tmp_path / "cache").iterdir()}
        assert len(names) == number


def test_a_copy_of_a_model_finds_the_stored_embeddings(bert, tmp_path):
    encoder(bert, cache_dir=tmp_path / "cache").encode(TEXTS)
    encoder(save_encoder(tmp_path / "copy"), cache_dir=tmp_path / "cache").encode(TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damaged_stored_embeddings_are_computed_again(bert, tmp_path, caplog):
    expected = encoder(bert, cache_dir=tmp_path).encode(TEXTS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-3], b"", whole[:-3] + b"abc"):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(encoder(bert, cache_dir=tmp_path).encode(TEXTS), expected)
        assert "is damaged" in caplog.text
        assert "computing the embeddings again" in caplog.text
        assert file.read_bytes() == whole
        caplog.clear()


def test_a_cache_that_cannot_be_written_loses_nothing(bert, tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    with caplog.at_level(logging.WARNING):
        found = encoder(bert, cache_dir=tmp_path / "file").encode(TEXTS)
    assert torch.equal(found, encoder(bert).encode(TEXTS, use_cache=False))
    assert "the embeddings cannot be stored as" in caplog.text


def test_models_that_are_no_encoders_are_refused(bert, tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(t5\) is not an encoder of texts; give one such as BERT or MPNet"):
        encoder(str(tmp_path)).encode(TEXTS)


def test_a_model_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    name = save_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "layer.1" not in key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of BertModel are missing in '.*', such as 'encoder.layer.1.*; give a complete model"):
        encoder(name).encode(TEXTS)


def test_a_missing_model_is_an_error_with_a_remedy():
    with pytest.raises(OSError, match="cannot load the tokenizer 'nobody/nothing'"):
        encoder("nobody/nothing").encode(TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, cls; got 'max'"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16; got 'float16'"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(**options)


def minilm():
    """The folder of the real model, from its package or the user's cache."""
    place = Path(next(iter(MINILM_FILES))).parent
    package = find_spec(place.parts[0])
    found = [Path(package.origin).parents[1] / place] if package and package.origin else []
    found.append(USER_CACHE / "packages" / MINILM.replace("==", "-") / place)
    folder = next((folder for folder in found if (folder / "model.safetensors").is_file()), None)
    return str(folder) if folder else pytest.skip(f"needs the files of {MINILM}")


def test_minilm_orders_sentences_by_meaning():
    texts = ["A man is eating food.", "A man eats a piece of bread.", "Someone is having a meal.", "The stock market fell sharply today."]
    embeddings = encoder(minilm()).encode(texts)
    assert embeddings.shape == (4, 384)
    similarities = (embeddings[1:] @ embeddings[0]).tolist()
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] > 0.7
    assert similarities[2] < 0.2
