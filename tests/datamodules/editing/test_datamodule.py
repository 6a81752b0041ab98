"""Training rows, edit requests and preserved text of EditingDataModule."""

import pytest

from malleable.datamodules.batch import PackedBatch
from malleable.datamodules.editing.datamodule import EditingDataModule
from malleable.datamodules.editing.requests import EditRequest
from malleable.datamodules.sources.editing.base import EditSource, EditTables
from malleable.datamodules.sources.editing.countries import Countries
from malleable.datamodules.sources.editing.texts import TextSource


class Texts(TextSource):
    """So many different texts."""

    def __init__(self, number):
        self.number = number

    def load(self):
        return [f"text number {number} tells nothing of note" for number in range(self.number)]


class OneRequest(EditSource):
    """One request and nothing told."""

    def load(self):
        return EditTables([EditRequest("1", "The color of {} is", "Anna", "red")])


def make_datamodule(source=None, **options):
    data = EditingDataModule(source or Countries(relations=["continent"], limit=20), **{"batch_size": 4, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def texts_of(data, rows):
    return [data.tokenizer.decode(row["input_ids"]) for row in (rows[index] for index in range(len(rows)))]


def test_every_statement_occurs_once_per_shuffle_in_different_documents():
    source = Countries(relations=["continent"], limit=20)
    data = make_datamodule(source, shuffles=2, sentences=4, pack_length=128)
    told = " ".join(texts_of(data, data.train_dataset))
    tables = source.load()
    assert all(told.count(sentence) == 2 for sentence in tables.statements)
    assert data.edit_requests == tables.requests
    assert data.row_tokens().sum() > 0


def test_edit_texts_contain_no_edited_fact():
    data = make_datamodule(shuffles=1)
    kept = " ".join(data.edit_texts)
    assert not any(f"The continent of {request.subject} is {request.true}." in kept for request in data.edit_requests)
    assert data.measured_texts == data.edit_texts[:100]
    assert len(data.test_dataset) > 0


def test_texts_are_held_out_for_perplexity():
    data = make_datamodule(texts=Texts(50), eval_documents=10, shuffles=1)
    assert len(data.measured_texts) == 10
    assert not set(data.measured_texts) & set(data.edit_texts)
    trained = " ".join(texts_of(data, data.train_dataset))
    assert "text number 39 tells" in trained
    assert "text number 40 tells" not in trained
    assert "text number 40 tells" in " ".join(texts_of(data, data.test_dataset))
    # Of few texts, half.
    assert len(make_datamodule(texts=Texts(6), eval_documents=10, shuffles=1).measured_texts) == 3


def test_requests_without_statements_need_texts():
    with pytest.raises(ValueError, match=r"OneRequest has no statements, and there are no texts; give texts with texts="):
        make_datamodule(OneRequest())
    data = make_datamodule(OneRequest(), texts=Texts(20))
    assert data.edit_texts == Texts(20).load()[:10]
    assert len(data.val_dataset) > 0


def test_batches_and_vocabulary():
    data = make_datamodule(vocab_size=400)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PackedBatch)
    assert len(batch) == 4
    assert data.vocabulary.vocab_size == len(data.tokenizer) == 400
    assert data.vocabulary.tokenizer is not None
    # Words are cut as pretrained models cut them: a blank begins a word.
    assert all(token.startswith("Ġ") or "Ġ" not in token for token in data.tokenizer.tokenize("The continent of Peru"))


@pytest.mark.parametrize(("options", "message"), [({"shuffles": 0}, "shuffles must be >= 1"), ({"pack_length": 1}, "pack_length must be >= 2")])
def test_invalid_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        EditingDataModule(Countries(), **options)
