"""Training steps never wait for the device.

They run on the device ``meta``, whose tensors hold no data: code takes the paths of an accelerator there.
"""

import pytest
import torch
from architectures import tiny_model
from synchronisations import Synchronisations, WatchedSteps, meta_trainer
from tiny import batch_of, tiny_config, tiny_rows
from tiny_data import TinyData
from tiny_graph import TinyGraphData
from toy_sequences import ToySequences, packed_row, training_rows

from malleable import DPO, GBCE, NFE, SFT, CausalLM, ComplEx, EncoderSettings, SequentialRecommender, SPRec
from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.datamodules.negative_samplers import Popularity
from malleable.lightning_modules.functional.language import chunked_head
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, Scratch
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.embedding import N3, KvsAll, NegativeSampling
from malleable.lightning_modules.losses.preference import SoftmaxDPO

CATALOG = Catalog(titles=("A", "B"), token_ids=((5, 1), (6, 1)), popularity=(1, 1), vocabulary=Vocabulary(40, eos_token_id=1))
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
ANSWER = [{"sample_id": n, "prompt": [3] * (n + 2), "answers": [[5] * n + [1]], "item_ids": [0], "seen": [0, 1][:n]} for n in range(3)]
PAIRS = [{**row, "answers": [*row["answers"], [6, 6, 1]], "item_ids": [0, 1], "reference_logps": [-3.0, -4.0]} for row in ANSWER]
SEVERAL = [{**row, "answers": [*row["answers"], [6, 6, 1], [7, 1]], "item_ids": [0, 1, 1], "reference_logps": [-3.0, -4.0, -2.0]} for row in ANSWER]
PACKED = [{"sample_id": n, "input_ids": [3] * (9 + n), "document_ids": [1] * 4 + [2] * (5 + n)} for n in range(3)]


def of_step(batch):
    """With the normaliser of the optimizer step, as the loader gives it."""
    batch.num_step_tokens = torch.tensor(7.0)
    return batch


CASES = {
    "SFT": (lambda c: SFT(c, CATALOG), ANSWER),
    "SFT on packed rows": (lambda c: SFT(c, CATALOG), PACKED),
    "DPO": (lambda c: DPO(c, CATALOG), PAIRS),
    "DPO with a supervised part": (lambda c: DPO(c, CATALOG, sft_weight=0.5), PAIRS),
    "DPO on several rejected answers": (lambda c: DPO(c, CATALOG, SoftmaxDPO()), SEVERAL),
    "SPRec, supervised": (lambda c: SPRec(c, CATALOG), ANSWER),
    "SPRec, preferences": (lambda c: SPRec(c, CATALOG), PAIRS),
    "CausalLM": (lambda c: CausalLM(c, Vocabulary(40, 1)), PACKED),
}


def module_of(name, config):
    make, rows = CASES[name]
    module = make(config)
    module.configure_model()
    return module.train(), rows


def step_on_meta(module, batch):
    module, batch = module.to("meta"), batch.to("meta")
    with Synchronisations() as waits:
        output = module.compute_loss(batch)
        output.loss.backward()
    return output, waits


@pytest.mark.parametrize("whole_step", [True, False], ids=["normalised over the step", "over the batch"])
@pytest.mark.parametrize("name", CASES)
def test_step(name, whole_step):
    module, rows = module_of(name, LanguageModelConfig(scratch=Scratch(**SIZES)))
    batch = batch_of(rows)
    output, waits = step_on_meta(module, of_step(batch) if whole_step and hasattr(batch, "num_step_tokens") else batch)
    assert not waits.found, waits
    assert output.loss.is_meta


@pytest.mark.parametrize("options", [{"lora": LoRA(r=2)}, {"attention": "eager"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_step_under_other_settings(name, options):
    module, rows = module_of(name, LanguageModelConfig(scratch=Scratch(**SIZES), **options))
    _, waits = step_on_meta(module, batch_of(rows))
    assert not waits.found, waits


def test_step_of_a_model_that_checks_for_padding(tmp_path):
    """GPT-2 searches its input for padding where it gets no mask."""
    tiny_model("gpt2", pad_token_id=0).save_pretrained(tmp_path)
    module, rows = module_of("SFT", LanguageModelConfig(name=str(tmp_path)))
    _, waits = step_on_meta(module, batch_of(rows))
    assert not waits.found, waits


def test_step_on_separate_rows():
    module, rows = module_of("DPO", LanguageModelConfig(scratch=Scratch(**SIZES)))
    module.decoding.shared_prompt = False
    _, waits = step_on_meta(module, batch_of(rows))
    assert not waits.found, waits


@pytest.mark.parametrize("options", [{}, {"lora": LoRA(r=2)}, {"lora": LoRA(r=2, target_modules=("lm_head",))}], ids=["trained", "frozen", "adapted"])
@pytest.mark.parametrize("name", ["SFT", "SFT on packed rows", "DPO", "CausalLM"])
def test_step_with_a_chunked_head(name, options, monkeypatch):
    monkeypatch.setattr(chunked_head, "ACCELERATOR_LIMIT", 0)
    monkeypatch.setattr(chunked_head, "ACCELERATOR_CHUNK", 3 * 40)
    module, rows = module_of(name, LanguageModelConfig(scratch=Scratch(**SIZES), **options))
    _, waits = step_on_meta(module, batch_of(rows))
    assert not waits.found, waits


def test_step_on_a_manually_created_batch():
    module, rows = module_of("DPO", LanguageModelConfig(scratch=Scratch(**SIZES)))
    batch = batch_of(rows)
    batch.answer_columns = None
    _, waits = step_on_meta(module, batch)
    assert not waits.found, waits


def known_pairs():
    rows = [{**row, "answers": [*row["answers"], [6, 1]], "item_ids": [*row["item_ids"], 0]} for row in tiny_rows(16)]
    return [{**row, "reference_logps": [-3.0, -4.0]} for row in rows]


PACKED_ITEMS = [packed_row(training_rows(32)[start : start + 2]) for start in range(0, 32, 2)]


def recommender(kind, **options):
    return SequentialRecommender(EncoderSettings(kind, dim=8, num_layers=1, max_length=12, dropout=0.1), **options)


TWO = {"batch_size": 4, "global_batch_size": 8}  # two batches in an optimizer step
WHOLE_STEPS = {
    "SFT": lambda: (SFT(tiny_config(), tuning=Tuning()), TinyData(train=tiny_rows(16), **TWO)),
    "DPO": lambda: (DPO(tiny_config(), sft_weight=0.5), TinyData(train=known_pairs(), **TWO)),
    "SPRec": lambda: (SPRec(tiny_config()), TinyData(train=known_pairs(), **TWO)),
    "NFE": lambda: (NFE(dimension=6, regulariser=N3(), dropout=0.1), TinyGraphData(**TWO)),
    "NFE with KvsAll": lambda: (NFE("nfe2", dimension=6, loss=KvsAll()), TinyGraphData(**TWO)),
    "ComplEx with sampled entities": lambda: (ComplEx(dimension=6, loss=NegativeSampling(4)), TinyGraphData(**TWO)),
    "SequentialRecommender": lambda: (recommender("sasrec"), ToySequences(train=PACKED_ITEMS, **TWO)),
    "SequentialRecommender, sampled": lambda: (recommender("hstu", loss=GBCE(), negatives=Popularity(4)), ToySequences(train=PACKED_ITEMS, **TWO)),
    "SequentialRecommender, GRU": lambda: (recommender("gru4rec"), ToySequences(train=PACKED_ITEMS, **TWO)),
    "SequentialRecommender, hidden items": lambda: (recommender("bert4rec"), ToySequences(train=PACKED_ITEMS, **TWO)),
}


@pytest.mark.parametrize("name", WHOLE_STEPS)
def test_whole_step_in_a_trainer(name, tmp_path, monkeypatch):
    """With logging, clipping, optimizer and scheduler. Step counters of optimizers are on the CPU, where nothing waits for them.

    Lightning reads what is logged with ``prog_bar=True`` after every batch.
    """
    module, data = WHOLE_STEPS[name]()
    monkeypatch.setattr(module, "export", lambda *args: None, raising=False)  # the weights hold no data
    waits = Synchronisations("meta")
    watched = WatchedSteps(lambda: waits)
    meta_trainer(tmp_path, max_epochs=1, limit_train_batches=4, gradient_clip_val=1.0, callbacks=[watched]).fit(module, data)
    assert watched.steps == 4
    assert not waits.found, waits
