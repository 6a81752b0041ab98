"""Weights meet only the data and the settings that they were trained with, whichever way they meet them."""

import inspect
import shutil
from dataclasses import asdict

import pytest
import small_shop
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoHaConfig, LoraConfig, get_peft_model
from tiny import tiny_config
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, tiny_graph
from transformers import AutoModelForCausalLM, AutoTokenizer

import malleable.lightning_modules as exported
from malleable import (
    DPO,
    NFE,
    SFT,
    CausalLM,
    ComplEx,
    Delta,
    DistMult,
    EditingDataModule,
    ItemKNN,
    Markov,
    Popularity,
    PostFitEdit,
    ReferenceCache,
    SPRec,
)
from malleable.datamodules import Countries
from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.language.tokenizer import tokenizer_digest
from malleable.datamodules.negative_samplers import Uniform
from malleable.lightning_modules.base import BaseModule
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, Scratch
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.patches.tensors import canonical_tensors

TEXT, COUNTED = (SFT, DPO, SPRec), (ItemKNN, Markov, Popularity)
COMMANDS = ("fit", "validate", "test", "predict")


def make(kind, **settings):
    if kind in COUNTED:
        return kind(ks=(1, 3), **settings)
    config = settings.pop("language_model", tiny_config())
    return kind(language_model=config, ks=(1, 3), decoding=Decoding(num_beams=3), tuning=Tuning(lr=1e-2, warmup_steps=0), **settings)


def data_of(kind, folder, variant=small_shop.shop, **options):
    return variant(folder, negatives=Uniform() if kind is DPO else None, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fits a class once on the small shop; gives the checkpoint and its test figures."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MALLEABLE_CACHE", str(tmp_path_factory.mktemp("cache")))
    runs = {}

    def run(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind.__name__)
            data, module = data_of(kind, folder / "shop"), make(kind)
            callbacks = [] if kind is not DPO else [ReferenceCache()]
            trainer = quiet_trainer(folder, max_epochs=1, enable_checkpointing=False, callbacks=callbacks)
            trainer.fit(module, data)
            trainer.save_checkpoint(folder / "saved.ckpt")
            runs[kind] = folder / "saved.ckpt", figures(module, data_of(kind, folder / "shop"), folder)
        return runs[kind]

    yield run
    patch.undo()


def figures(module, data, folder, **options):
    (found,) = quiet_trainer(folder).test(module, data, verbose=False, **options)
    return found


def meet(command, module, data, folder, path):
    trainer = quiet_trainer(folder, max_epochs=2, enable_checkpointing=False)
    getattr(trainer, command)(module, data, ckpt_path=path, weights_only=True)


# --- items, users, template, tokenizer ---


@pytest.mark.parametrize("kind", [*TEXT, *COUNTED])
def test_reordered_items_are_refused_or_aligned(kind, trained, tmp_path):
    path, expected = trained(kind)
    with pytest.raises(MisconfigurationException, match=r"items: 12 in the checkpoint, 12 here, in another order.*--data.tokenizer <checkpoint>"):
        figures(make(kind), data_of(kind, tmp_path / "new", small_shop.reordered), tmp_path, ckpt_path=path, weights_only=True)
    aligned = data_of(kind, tmp_path / "new", small_shop.reordered, tokenizer=str(path))
    assert figures(make(kind), aligned, tmp_path, ckpt_path=path, weights_only=True) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("command", COMMANDS)
def test_another_tokenizer_is_refused(command, trained, tmp_path):
    """The BPE of a shop with more users, which the same number of tokens hides."""
    path, _ = trained(SFT)
    predicted = tmp_path / "histories.csv"
    predicted.write_text("item_id\nf1,f2\n")
    data = small_shop.more_users(tmp_path / "new", predict_file=str(predicted))
    with pytest.raises(MisconfigurationException, match=r"trained on other data: .*tokenizer \w{12} in the checkpoint, \w{12} here"):
        meet(command, make(SFT), data, tmp_path, path)
    meet(command, make(SFT), small_shop.more_users(tmp_path / "new", predict_file=str(predicted), tokenizer=str(path)), tmp_path, path)


@pytest.mark.parametrize("kind", [SFT, ItemKNN])
def test_a_loaded_module_refuses_other_data(kind, trained, tmp_path):
    """Without the Trainer's ``ckpt_path``: the module brings the catalogue, the data module another."""
    path, expected = trained(kind)
    module = kind.load_from_checkpoint(path, weights_only=True)
    with pytest.raises(MisconfigurationException, match="in another order"):
        figures(module, data_of(kind, tmp_path / "new", small_shop.reordered), tmp_path)
    assert figures(module, data_of(kind, path.parent / "shop"), tmp_path) == pytest.approx(expected, abs=1e-5)


def test_counts_of_a_checkpoint_do_not_depend_on_the_tokenizer(trained, tmp_path):
    path, _ = trained(ItemKNN)
    figures(make(ItemKNN), small_shop.more_users(tmp_path / "new", tokenizer="none"), tmp_path, ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("kind", [SFT, Markov])
def test_new_items_on_request(kind, trained, tmp_path):
    path, _ = trained(kind)
    options = {"ckpt_path": path, "weights_only": True}
    found = figures(make(kind), data_of(kind, tmp_path / "new", small_shop.more_items, tokenizer=str(path), extend_catalog=True), tmp_path, **options)
    assert 0 <= found["test_hr_3"] <= 1
    loaded = kind.load_from_checkpoint(path, weights_only=True)
    data = data_of(kind, tmp_path / "new", small_shop.more_items, tokenizer=str(path), extend_catalog=True)
    assert figures(loaded, data, tmp_path) == pytest.approx(found, abs=1e-5)
    assert len(loaded.catalog) == 14
    data = data_of(kind, tmp_path / "new", small_shop.more_items)
    with pytest.raises(MisconfigurationException, match=r"12 in the checkpoint, 14 here, 2 new \('A Quiet Mirror', 'A Quiet Harbor'\)"):
        figures(make(kind), data, tmp_path, **options)


def test_another_template_is_refused(trained, tmp_path):
    path, _ = trained(SFT)
    catalog = SFT.load_from_checkpoint(path, weights_only=True).catalog
    data = small_shop.shop(tmp_path / "new", tokenizer=catalog.vocabulary.tokenizer, template="instruction")
    with pytest.raises(MisconfigurationException, match=r"template: 'prefix' '' in the checkpoint, 'The user enjoyed.* here, .* and 4 more"):
        figures(make(SFT), data, tmp_path, ckpt_path=path, weights_only=True)


def test_the_file_alone_is_enough_on_another_machine(trained, tmp_path, monkeypatch):
    path, expected = trained(SFT)
    copy = shutil.copy(path, tmp_path / "moved.ckpt")
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "empty"))
    module = SFT.load_from_checkpoint(copy, weights_only=True)
    assert str(tmp_path / "empty") in module.catalog.vocabulary.tokenizer
    data = small_shop.shop(tmp_path / "new", tokenizer=str(copy))
    assert figures(make(SFT), data, tmp_path, ckpt_path=copy, weights_only=True) == pytest.approx(expected, abs=1e-5)
    folder = module.export(tmp_path)
    AutoTokenizer.from_pretrained(folder)
    assert tokenizer_digest(str(folder)) == tokenizer_digest(module.catalog.vocabulary.tokenizer)
    aligned = small_shop.reordered(tmp_path / "reordered", tokenizer=str(folder))
    aligned.prepare_data()
    aligned.setup("test")
    assert aligned.catalog.titles == module.catalog.titles


@pytest.mark.parametrize(("command", "part"), [("test", "model"), ("fit", "adapter")])
def test_an_exported_model_refuses_another_tokenizer(command, part, trained, tmp_path, caplog):
    """As ``language_model.name`` or ``adapter``: the folder says which tokenizer its weights were trained with."""
    path, expected = trained(SFT)
    base = SFT.load_from_checkpoint(path, weights_only=True).export(tmp_path)
    config = LanguageModelConfig(name=str(base))
    if part == "adapter":
        trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
        tuned = make(SFT, language_model=LanguageModelConfig(name=str(base), lora=LoRA(r=2)))
        trainer.fit(tuned, small_shop.shop(path.parent / "shop", tokenizer=str(base)))
        bare = shutil.copytree(base, tmp_path / "bare")
        (bare / "malleable.json").unlink()
        config = LanguageModelConfig(name=str(bare), adapter=str(tuned.export(tmp_path)))
    folder = str(config.adapter or config.name)
    message = rf"the model in .*{part} was trained with another tokenizer .*tokenizer \w{{12}} in {part}, \w{{12}} here.*--data.tokenizer {folder}"
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=message):
        getattr(trainer, command)(make(SFT, language_model=config), small_shop.more_users(tmp_path / "new"))
    getattr(trainer, command)(make(SFT, language_model=config), small_shop.more_items(tmp_path / "new", tokenizer=folder, extend_catalog=True))
    if part == "model":
        found = figures(make(SFT, language_model=config), small_shop.shop(path.parent / "shop", tokenizer=folder), tmp_path)
        assert found == pytest.approx(expected, abs=1e-5)
        tokenizer = shutil.copytree(base, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("malleable.json"))
        figures(make(SFT, language_model=config), small_shop.shop(tmp_path / "t", tokenizer=str(tokenizer), template="instruction"), tmp_path)
        assert "was trained with another prompt template: template: 'prefix' '' in model, 'The user enjoyed" in caplog.text


def test_an_earlier_checkpoint_is_read_with_a_warning(trained, tmp_path, caplog):
    path, expected = trained(SFT)
    entries = torch.load(path, weights_only=True)
    old = {key: value for key, value in entries.items() if key not in ("tokenizer", "settings")}
    for name in ("keys", "template"):
        old["catalog"].pop(name)
    torch.save(old, tmp_path / "old.ckpt")
    options = {"ckpt_path": tmp_path / "old.ckpt", "weights_only": True}
    assert figures(make(SFT), small_shop.shop(path.parent / "shop"), tmp_path, **options) == pytest.approx(expected, abs=1e-5)
    assert "written by an earlier version, without the settings" in caplog.text
    with pytest.raises(MisconfigurationException, match="in another order"):
        figures(make(SFT), small_shop.reordered(tmp_path / "new"), tmp_path, **options)


# --- settings ---


@pytest.mark.parametrize("command", COMMANDS)
def test_another_number_of_heads_is_refused(command, trained, tmp_path):
    path, _ = trained(SFT)
    other = tiny_config()
    other.scratch = Scratch(hidden_size=16, num_layers=1, num_heads=4, max_length=64)
    predicted = tmp_path / "histories.csv"
    predicted.write_text("item_id\nf1,f2\n")
    message = r"other settings than this SFT has: .*language_model.scratch.num_heads 2 in the checkpoint, 4 here.*Omit these options"
    with pytest.raises(MisconfigurationException, match=message):
        meet(command, make(SFT, language_model=other), small_shop.shop(path.parent / "shop", predict_file=str(predicted)), tmp_path, path)
    with pytest.raises(MisconfigurationException, match=message):
        SFT.load_from_checkpoint(path, weights_only=True, language_model=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 16}, "language_model.lora.alpha 4 in the checkpoint, 16 here"),
        ({"r": 4}, "language_model.lora.r 2 in the checkpoint, 4 here"),
        ({"target_modules": ["q_proj"]}, "language_model.lora.target_modules: 7 in the checkpoint, 1 here"),
    ],
)
def test_another_adapter_is_refused(change, message, trained, tmp_path):
    path, _ = trained(SFT)
    config = tiny_config(lora=LoRA(r=2, alpha=4, dropout=0.0))
    trainer = quiet_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    trainer.fit(make(SFT, language_model=config), small_shop.shop(path.parent / "shop"))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    config.lora = LoRA(**{"r": 2, "alpha": 4, "dropout": 0.1, **change})
    with pytest.raises(MisconfigurationException, match=message):
        SFT.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, language_model=config)


ADAPTERS = [
    (LoraConfig, {"r": 2, "lora_alpha": 4}, {"use_rslora": True}, "use_rslora: False in the checkpoint, True here|use_rslora False .* True here"),
    (LoraConfig, {"r": 2, "lora_alpha": 4}, {"alpha_pattern": {"q_proj": 64}}, "alpha_pattern"),
    (LoHaConfig, {"r": 2, "alpha": 4}, {"alpha": 16}, "lora.alpha 4 in the checkpoint, 16 here"),
]


@pytest.mark.parametrize(("kind", "options", "change", "message"), ADAPTERS)
def test_other_settings_of_a_stored_adapter_are_refused(kind, options, change, message, trained, tmp_path):
    """Adapters of equal shapes and weights, whose configurations make other functions of them."""
    path, _ = trained(SFT)
    base = SFT.load_from_checkpoint(path, weights_only=True).export(tmp_path)
    names = []
    for number, changed in enumerate(({}, change)):
        settings = kind(task_type="CAUSAL_LM", target_modules=["q_proj"], **options | changed)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / f"adapter-{number}")
        names.append(LanguageModelConfig(name=str(base), adapter=str(tmp_path / f"adapter-{number}")))
    trainer = quiet_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    trainer.fit(make(SFT, language_model=names[0]), small_shop.shop(path.parent / "shop", tokenizer=str(base)))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    SFT.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, language_model=names[0])
    with pytest.raises(MisconfigurationException, match=message):
        SFT.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True, language_model=names[1])


def test_options_without_effect_on_the_output_may_differ(trained, tmp_path):
    path, expected = trained(SFT)
    other = tiny_config(gradient_checkpointing=True, attention="eager")
    module = SFT(language_model=other, ks=(1, 3), decoding=Decoding(num_beams=12), tuning=Tuning(lr=1.0))
    found = figures(module, small_shop.shop(path.parent / "shop", eval_batch_size=5), tmp_path, ckpt_path=path, weights_only=True)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-5)


def test_options_of_a_score_are_settings(trained, tmp_path):
    path, _ = trained(Markov)
    with pytest.raises(MisconfigurationException, match=r"smoothing 1.0 in the checkpoint, 0.5 here"):
        figures(make(Markov, smoothing=0.5), small_shop.shop(path.parent / "shop"), tmp_path, ckpt_path=path, weights_only=True)


# --- texts, and edits ---


class Nudge(PostFitEdit):
    """Adds a little to one matrix."""

    kind = "nudge"

    def make_patch(self, trainer, pl_module, model):
        name = "model.layers.0.mlp.down_proj.weight"
        return self.patch(model, {name: Delta(torch.full_like(canonical_tensors(model)[name], 0.01))}, title="nudge")


def facts(relation, **options):
    return EditingDataModule(Countries(relations=[relation], limit=20), vocab_size=300, shuffles=1, pack_length=64, batch_size=4, **options)


def test_an_edited_model_of_texts_keeps_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "cache"))
    module = CausalLM(tiny_config(), tuning=Tuning(lr=1e-2, warmup_steps=0))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Nudge(), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)])
    trainer.fit(module, facts("continent"))
    (expected,) = quiet_trainer(tmp_path).test(module, facts("continent"), verbose=False)
    plain, edited = (torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "edited"))
    assert plain.keys() | {"patches"} == edited.keys()
    assert plain["vocabulary"] == edited["vocabulary"]
    assert plain["settings"] == edited["settings"]
    path = shutil.copy(tmp_path / "checkpoints/edited.ckpt", tmp_path / "moved.ckpt")
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(MisconfigurationException, match=r"tokenizer \w{12} in the checkpoint, \w{12} here.*--data.tokenizer <checkpoint>"):
        figures(CausalLM(tiny_config()), facts("language"), tmp_path, ckpt_path=path, weights_only=True)
    found = figures(CausalLM(tiny_config()), facts("continent", tokenizer=str(path)), tmp_path, ckpt_path=path, weights_only=True)
    assert found == pytest.approx(expected, abs=1e-5)
    figures(CausalLM(tiny_config()), facts("language", tokenizer=str(path)), tmp_path, ckpt_path=path, weights_only=True)


# --- graphs ---


def graph_run(tmp_path, module):
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, TinyGraphData())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_relabelled_graph_is_refused(command, tmp_path):
    path = graph_run(tmp_path, NFE(dimension=4))
    other = TinyGraphData()
    other.graph = KnowledgeGraph(("someone", *tiny_graph().entities[1:]), tiny_graph().relations)
    with pytest.raises(MisconfigurationException, match=r"another graph: entities: .*1 new \('someone'\), 1 missing \('person 0'\)"):
        meet(command, NFE(dimension=4), other, tmp_path, path)
    with pytest.raises(MisconfigurationException, match="1 new"):
        getattr(quiet_trainer(tmp_path, max_epochs=1), command)(NFE.load_from_checkpoint(path, weights_only=True), other)


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        (ComplEx(dimension=4), DistMult(dimension=8), "interaction 'ComplexDiagonal' in the checkpoint, 'Diagonal' here"),
        (NFE(dimension=4, gamma=2.0), NFE(dimension=4, gamma=3.0), "gamma 2.0 in the checkpoint, 3.0 here"),
        (NFE("nfe2", dimension=4), NFE("nfe2", dimension=4, flow={"swap_on_negative_scale": True}), "swap.* False in the checkpoint, True here"),
    ],
)
def test_another_score_of_a_graph_is_refused(stored, given, message, tmp_path):
    path = graph_run(tmp_path, stored)
    with pytest.raises(MisconfigurationException, match=message):
        meet("test", given, TinyGraphData(), tmp_path, path)


# --- every module ---

ADJUSTABLE = {"catalog", "vocabulary", "graph", "optimizer", "lr_scheduler", "tuning", "loss", "regulariser", "dropout", "init", "sft_weight", "ks"}
ADJUSTABLE |= {"decoding", "ranking", "exclude_seen", "frozen", "language_model", "negatives"}
ADJUSTABLE |= {"behaviors"}  # checkpoints store and compare them separately
ADJUSTABLE_PARTS = {"name", "adapter", "dtype", "gradient_checkpointing", "local_files_only", "attention", "compile"}
ADJUSTABLE_PARTS |= {"lora.dropout", "scratch.dropout"}


MODULES = [kind for name in exported.__all__ if isinstance(kind := getattr(exported, name), type) and issubclass(kind, BaseModule)]


@pytest.mark.parametrize("kind", [kind for kind in MODULES if not inspect.isabstract(kind)])
def test_every_option_is_a_weight_setting_or_adjustable(kind):
    """An option that is new must be put on one of the two sides."""
    settings = set(kind.weight_settings)
    unknown = set(inspect.signature(kind).parameters) - ADJUSTABLE - {setting.split(".")[0] for setting in settings} - {"interaction"}
    assert not unknown
    parts = {setting.removeprefix("language_model.") for setting in settings if setting.startswith("language_model.")}
    if parts:
        assert parts | ADJUSTABLE_PARTS == leaves(tiny_config(lora=LoRA()))


def leaves(config):
    """Dotted names of the fields of a dataclass."""
    found = set()
    for name, value in asdict(config).items():
        found |= {f"{name}.{part}" for part in value} if isinstance(value, dict) else {name}
    return found
