"""Second moments over text: equal for all piece sizes, after interruptions and on several ranks; files of other models raise."""

import copy

import pytest
import torch
from small_editing import SENTENCES, decoder, tokenizer
from tokenizers import normalizers

from malleable.lightning_modules.editing import statistics
from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments

TEXTS = [f"{sentence} {word}" for sentence in SENTENCES for word in ("Anna", "the dog", "is", "Lima on the coast")]


def moments(model=None, texts=TEXTS, file=None, side="right", **settings):
    model = model or decoder()
    return second_moments(
        model, find_layout(model), (1, 2), tokenizer("bos", side), texts, StatisticsSettings(**{"save_minutes": 0, **settings}), file
    )


def by_hand(model, exclude_first=False):
    keys = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    for text in TEXTS:
        model(torch.tensor([tokenizer("bos")(text)["input_ids"]]))
    handle.remove()
    rows = torch.cat([part[1:] if exclude_first else part for part in keys]).double()
    return rows.T @ rows / len(rows), len(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_tokens", [8192, 64])
@pytest.mark.parametrize("piece", [512, 3])
@torch.no_grad()
def test_moments_are_means_over_unmasked_tokens(side, max_tokens, piece):
    expected, count = by_hand(decoder())
    found = moments(side=side, max_tokens=max_tokens, piece=piece)[2]
    assert found.count == count
    torch.testing.assert_close(found.mean(), expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_exclude_first():
    expected, count = by_hand(decoder(), exclude_first=True)
    found = moments(exclude_first=True)[2]
    assert found.count == count
    torch.testing.assert_close(found.mean(), expected, rtol=1e-4, atol=1e-7)


def test_long_texts_are_truncated():
    assert moments(max_length=5)[1].count == 5 * len(TEXTS)


def test_interrupted_computation_continues(tmp_path, monkeypatch):
    whole = moments(piece=4)
    file = tmp_path / "moments.safetensors"
    calls = []
    add = statistics._add

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(statistics, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moments(piece=4, file=file)
    resumed = moments(piece=4, file=file)
    assert len(calls) == 5, "two of four pieces were done, one was lost, two were left"
    assert torch.equal(resumed[2].total, whole[2].total)
    assert resumed[2].count == whole[2].count
    moments(piece=4, file=file)
    assert len(calls) == 5, "nothing is left to do"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_temporary_folder_of_a_killed_process_is_removed(tmp_path):
    file = tmp_path / "moments.safetensors"
    moments(file=file)
    (tmp_path / f".{file.name}.xyz.tmp").mkdir()
    moments(file=file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("other", ["model", "text", "setting"])
def test_moments_of_another_model_text_or_setting_raise(tmp_path, other):
    file = tmp_path / "moments.safetensors"
    moments(file=file)
    changed = {"model": {"model": decoder(seed=1)}, "text": {"texts": TEXTS[1:]}, "setting": {"exclude_first": True}}[other]
    with pytest.raises(ValueError, match="another model, text or setting"):
        moments(file=file, **changed)


def test_moments_of_another_tokenizer_or_configuration_raise(tmp_path):
    """Of equal size and weights."""
    file = tmp_path / "moments.safetensors"
    model = decoder()
    moments(model, file=file)
    other = copy.deepcopy(tokenizer("bos"))
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len(other) == len(tokenizer("bos"))
    options = {"layout": find_layout(model), "layers": (1, 2), "texts": TEXTS, "file": file}
    with pytest.raises(ValueError, match="another model, text or setting"):
        second_moments(model, tokenizer=other, **options)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 123.0}
    with pytest.raises(ValueError, match="another model, text or setting"):
        second_moments(model, tokenizer=tokenizer("bos"), **options)


def test_no_text_raises():
    with pytest.raises(ValueError, match="need text"):
        moments(texts=[])


def test_max_tokens_bounds_a_pass(monkeypatch):
    sizes = []
    batches = statistics._batches

    def watched(*arguments):
        for ids, mask in batches(*arguments):
            sizes.append(ids.numel())
            yield ids, mask

    monkeypatch.setattr(statistics, "_batches", watched)
    moments(max_tokens=256)
    assert len(sizes) > 1
    assert 128 < max(sizes) <= 256


def test_hash_in_the_name_gives_each_model_its_own_file(tmp_path):
    file = tmp_path / "moments-{hash}.safetensors"
    moments(file=file)
    moments(decoder(seed=1), file=file)
    moments(file=file)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: content[:40]])
def test_damaged_file_is_computed_again_or_raises(tmp_path, damage):
    whole = moments()
    for name in ("moments-{hash}.safetensors", "moments.safetensors"):
        moments(file=tmp_path / name)
    for path in tmp_path.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    healed = moments(file=tmp_path / "moments-{hash}.safetensors")
    assert torch.equal(healed[2].total, whole[2].total)
    with pytest.raises(ValueError, match=r"moments\.safetensors is damaged .*; remove the file, give another one"):
        moments(file=tmp_path / "moments.safetensors")


def test_file_is_not_written_after_every_piece(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(statistics, "_write", lambda *arguments: written.append(arguments[-1]))
    moments(piece=4, file=tmp_path / "moments", save_minutes=10)
    assert len(written) == 1
