"""The loop: its plan, its phases, its equalities with plain training, and its refusals."""

import contextlib
import html
import logging
import math
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from self_play_run import make_loop, make_module
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from torch.utils.data import DataLoader

from malleable.callbacks.reference import ReferenceCache
from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.callbacks.self_play.phases import Phase, PhaseSettings, plan_phases, reset_moments
from malleable.callbacks.self_play.round_file import RoundFile, answer_statistics
from malleable.datamodules.batch import PreferenceBatch
from malleable.datamodules.loading import PhasedLoader
from malleable.datamodules.negative_samplers import Popularity, SelfPlay, Uniform
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.dpo import DPO
from malleable.lightning_modules.recommendation.sft import SFT


class Watch(Callback):
    """Note the phase, loss, rate and kind of every batch."""

    def __init__(self, loop: SelfPlayLoop) -> None:
        self.loop = loop
        self.steps: list[tuple[str, int, float, bool]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        phase = self.loop.phases[trainer.current_epoch]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((phase.kind, phase.round, rate, isinstance(batch, PreferenceBatch), float(outputs["loss"])))


def run(folder, loop=None, module=None, data=None, **changes):
    """Fit once from the same start; return the module, the trainer and what was watched."""
    seed_everything(7)
    loop = loop or make_loop()
    watch = Watch(loop)
    trainer = quiet_trainer(folder, max_epochs=-1, callbacks=[loop, watch], **changes)
    module = module or make_module(dropout=0.0)
    trainer.fit(module, data or TinyData())
    return module, trainer, watch.steps


def weights(module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}


def assert_equal(first, second) -> None:
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_plan_phases():
    assert plan_phases(2, {"warmup": 2, "sft": 1, "dpo": 1}) == [
        Phase("warmup", 0, 0),
        Phase("warmup", 0, 1),
        Phase("sft", 1, 0),
        Phase("dpo", 1, 0),
        Phase("sft", 2, 0),
        Phase("dpo", 2, 0),
    ]
    assert plan_phases(0, {"warmup": 1, "sft": 1, "dpo": 1}) == [Phase("warmup", 0, 0)]
    assert plan_phases(1, {"warmup": 0, "sft": 0, "dpo": 2}) == [Phase("dpo", 1, 0), Phase("dpo", 1, 1)]


def test_complete_run(tmp_path):
    _, trainer, steps = run(tmp_path)
    assert [kind for kind, *_ in steps if kind == "warmup"] == ["warmup"] * 24
    assert all(preference == (kind == "dpo") for kind, _, _, preference, _ in steps)
    for number in (1, 2):
        losses = [loss for kind, round_, _, _, loss in steps if (kind, round_) == ("dpo", number)]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6), "policy and reference start equal: loss log 2"
        assert min(losses) < losses[0]
        drawn = pq.read_table(tmp_path / f"run/self_play/round_{number}.parquet").to_pydict()
        pairs = pq.read_table(tmp_path / f"run/self_play/round_{number}_pairs.parquet").to_pydict()
        assert len(drawn["positions"]) == 32
        assert set(drawn) == {"positions", "sample_ids", "items", "answers"}
        assert all(list(TOKENS[item]) == answer for (item,), (answer,) in zip(drawn["items"], drawn["answers"], strict=True))
        rows = tiny_rows(48)
        assert all(rows[place]["item_ids"] != items for place, items in zip(pairs["positions"], pairs["items"], strict=True)), "no identical pair"
        assert len(pairs["reference"]) == len(pairs["positions"]) <= 32
    # Peak 1e-3 after a rise of two steps, then linearly down: 8 steps give 1/2, 1, then 6 of 6, 5 of 6, ...
    rates = [rate for kind, round_, rate, _, _ in steps if (kind, round_) == ("sft", 1)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (6 - step) / 6 for step in range(6))])
    assert trainer.current_epoch == 6
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_rounds_share_no_row_until_the_pool_is_used_up(tmp_path):
    run(tmp_path, make_loop(rows_per_round=24))
    first, second = (set(pq.read_table(tmp_path / f"run/self_play/round_{number}.parquet")["positions"].to_pylist()) for number in (1, 2))
    assert len(first) == len(second) == 24
    assert not first & second


def test_zero_rounds_equal_supervised_tuning(tmp_path):
    """K = 0: bit-equal to SFT with the same rate, course and steps. The report has no model before self-play."""
    loop = make_loop(rounds=0)
    looped, trainer, _ = run(tmp_path / "loop", loop)
    trainer.test(looped, TinyData(), verbose=False)
    assert loop.state.before == {}
    assert loop.report_columns() == loop.report_sections() == []
    seed_everything(7)
    plain = SFT(language_model=tiny_config(), tuning=Tuning(lr=1e-2, warmup_steps=0))
    quiet_trainer(tmp_path / "sft", max_epochs=2).fit(plain, TinyData())
    assert_equal(looped, plain)


def test_without_preference_phase_it_is_continued_supervised_tuning(tmp_path):
    _, _, steps = run(tmp_path, make_loop(dpo=PhaseSettings(epochs=0)))
    assert {kind for kind, *_ in steps} == {"warmup", "sft"}


def test_frozen_negatives_equal_plain_dpo(tmp_path):
    """One round without supervised phases on stored negatives: bit-equal to DPO on that file."""
    only_dpo = make_loop(rounds=1, rows_per_round=None, warmup=PhaseSettings(epochs=0), sft=PhaseSettings(epochs=0), keep_identical="keep")
    looped, *_ = run(tmp_path / "loop", only_dpo)
    file = RoundFile.read(tmp_path / "loop/run/self_play/round_1.parquet")
    view = file.pairs(tiny_rows(48))
    seed_everything(7)
    plain = DPO(language_model=tiny_config(), tuning=Tuning(lr=1e-3, warmup_steps=2))
    trainer = quiet_trainer(tmp_path / "dpo", max_epochs=1, callbacks=[ReferenceCache()])
    trainer.fit(plain, TinyData(train=[view[index] for index in range(len(view))]))
    assert_equal(looped, plain)


def test_identical_pairs_have_no_gradient(tmp_path):
    """chosen = rejected: loss log 2, gradient exactly zero, so the model stays."""
    rows = [row | {"sample_id": index} for index, row in enumerate([tiny_rows(1)[0]] * 8)]
    loop = make_loop(
        rounds=1,
        rows_per_round=None,
        warmup=PhaseSettings(epochs=0),
        sft=PhaseSettings(epochs=0),
        keep_identical="keep",
    )
    module = make_module(dropout=0.0)
    target = rows[0]["item_ids"][0]
    module.generate_negatives = lambda batch, sampler, seed: torch.full((len(batch), 1), target)
    before = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(weights(pl_module))
            pl_module.tuning.weight_decay = 0.0

    seed_everything(7)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[loop, Start(), watch := Watch(loop)])
    trainer.fit(module, TinyData(train=rows))
    assert [loss for *_, loss in watch.steps] == pytest.approx([math.log(2)] * 2, abs=1e-7)
    for name, value in weights(module).items():
        assert torch.equal(value, before[name]), name


def test_all_identical_is_a_warning(tmp_path):
    """A model that is always right has nothing to prefer: the phase passes without effect instead of ending the run."""
    module = make_module(dropout=0.0)
    rows = [row | {"sample_id": index} for index, row in enumerate([tiny_rows(1)[0]] * 8)]
    module.generate_negatives = lambda batch, sampler, seed: batch.item_ids[:, :1]
    with pytest.warns(UserWarning, match="differs from the true answer in only 0 of 8 rows"):
        _, trainer, steps = run(tmp_path, make_loop(rounds=1, rows_per_round=8), module, TinyData(train=rows))
    assert [loss for kind, *_, loss in steps if kind == "dpo"] == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert trainer.current_epoch == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"negatives_from": "post_sft"},
        {"negatives": Uniform()},
        {"negatives": Popularity()},
        {"negatives": SelfPlay(decode="greedy", num_negatives=2)},
        {"negatives": SelfPlay(decode="beam_k_random", num_beams=4)},
        {"negatives": SelfPlay(decode="sample", exclude_seen=False)},
        {"negatives": SelfPlay(grounding="none", max_new_tokens=6)},
        {"negatives": SelfPlay(grounding="embedding", max_new_tokens=6)},
        {"warmup": PhaseSettings(epochs=1, rows=16)},
    ],
    ids=str,
)
def test_all_options_run(tmp_path, changes):
    _, _, steps = run(tmp_path, make_loop(rounds=1, **changes))
    assert steps[-1][0] == "dpo"
    assert all(math.isfinite(loss) for *_, loss in steps)
    file = RoundFile.read(tmp_path / "run/self_play/round_1_pairs.parquet")
    rows = tiny_rows(48)
    for place, items, answers in zip(file.positions, file.items, file.answers, strict=True):
        assert list(rows[place]["answers"][0]) not in answers
        play = changes.get("negatives", SelfPlay())
        if not isinstance(play, SelfPlay) or (play.exclude_seen and play.grounding != "none"):
            assert not set(items) & set(rows[place]["history"])
        if getattr(play, "grounding", "trie") == "trie":
            assert min(items) >= 0


def test_late_negatives_come_from_the_tuned_model(tmp_path):
    """pre_round asks before the supervised phase, post_sft after it: a strong phase changes the answers."""
    strong = PhaseSettings(epochs=4, lr=3e-2, warmup_steps=0)
    early, late = (tmp_path / name for name in ("pre_round", "post_sft"))
    for folder in (early, late):
        run(folder, make_loop(rounds=1, rows_per_round=48, sft=strong, negatives=SelfPlay(), negatives_from=folder.name))
    before, after = (RoundFile.read(folder / "run/self_play/round_1_pairs.parquet") for folder in (early, late))
    assert len(after.positions) < len(before.positions), "the tuned model is right more often, and its right answers are dropped"


def test_self_play_reduces_concentration(tmp_path):
    """A model tuned on rows with one favourite recommends it too often; playing against itself it does so less (ORRatio falls)."""
    rows = tiny_rows(96)
    loop = make_loop(
        rounds=4,
        rows_per_round=96,
        warmup=PhaseSettings(epochs=1, lr=1e-2, warmup_steps=0),
        sft=PhaseSettings(epochs=0),
        dpo=PhaseSettings(lr=3e-3, warmup_steps=0),
        negatives=SelfPlay(decode="sample"),
        compare_on="test",
    )
    module, trainer, _ = run(tmp_path, loop, data=TinyData(train=rows))
    (after,) = trainer.test(module, TinyData(), verbose=False)
    before = loop.state.before["figures"]
    assert before["or_ratio_3"] > 0.6
    assert after["test_or_ratio_3"] < before["or_ratio_3"] - 0.05


def test_optimizer_is_reset_for_each_phase(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
    reset_moments(optimizer)
    state = optimizer.state[parameter]
    assert state["step"] == 0
    assert state["exp_avg"].abs().sum() == state["exp_avg_sq"].abs().sum() == 0


def test_a_phase_may_take_larger_steps(tmp_path):
    """32 rows a round: 8 steps of 4, or 2 of 16; the loader's own step comes back with the next phase."""
    loop = make_loop(sft=PhaseSettings(lr=1e-3, batch_factor=4), dpo=PhaseSettings(lr=1e-3, batch_factor=2), keep_identical="keep")
    _, _, steps = run(tmp_path, loop, data=TinyData(batch_size=2, global_batch_size=4))
    counts = [sum((kind, round_) == step[:2] for step in steps) for kind, round_ in (("sft", 1), ("dpo", 1), ("sft", 2))]
    assert counts == [2 * 2, 4 * 2, 2 * 2], "two batches make a step in every phase"
    assert len([kind for kind, *_ in steps if kind == "warmup"]) == 24 * 2


def test_bare_trainer_and_loader(tmp_path):
    """No data module: the reader's own DataLoader, wrapped."""
    seed_everything(7)
    loader = PhasedLoader(DataLoader(tiny_rows(48), batch_size=4, shuffle=True, drop_last=True, collate_fn=batch_of))
    loop = make_loop(loader=loader)
    module = make_module(dropout=0.0)
    module.catalog = tiny_catalog()
    quiet_trainer(tmp_path / "bare", max_epochs=-1, callbacks=[loop]).fit(module, loader)
    with_data, *_ = run(tmp_path / "data")
    assert_equal(module, with_data)


def test_moved_run_resumes_in_a_new_folder(tmp_path, monkeypatch):
    """From another working directory; each resumed run has all that the next one needs."""
    whole, *_ = run(tmp_path / "whole", make_loop(rounds=1))

    class Stop(Callback):
        def __init__(self, epoch):
            self.epoch = epoch

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == self.epoch:
                raise KeyboardInterrupt

    folder, path = Path("a"), None
    for stop, name in ((2, "b"), (3, "c"), (9, None)):
        monkeypatch.chdir(tmp_path)
        seed_everything(7)
        last = ModelCheckpoint(folder / "run/checkpoints", filename="saved", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = quiet_trainer(folder, max_epochs=-1, callbacks=[make_loop(rounds=1), Stop(stop), last])
        module = make_module(dropout=0.0)
        with contextlib.suppress(SystemExit):
            trainer.fit(module, TinyData(), ckpt_path=path)
        if name:
            (tmp_path / folder).rename(tmp_path / f"moved-{folder}")
            path = tmp_path / f"moved-{folder}/run/checkpoints/saved.ckpt"
            shutil.rmtree(tmp_path / f"moved-{chr(ord(str(folder)) - 1)}", ignore_errors=True)
            folder = Path(name)
    assert_equal(module, whole)


def test_phases_record_their_own_metrics_only(tmp_path):
    loop = make_loop()
    run(tmp_path, loop)
    logged = {kind: {key for entry in loop.state.history if entry["phase"] == kind for key in entry} for kind in ("warmup", "sft", "dpo")}
    assert "train_logps_chosen" in logged["dpo"]
    assert not {key for kind in ("warmup", "sft") for key in logged[kind] if "rewards" in key or "logps" in key}
    assert all("train_loss" in keys for keys in logged.values())
    assert loop.report_phases() == [(0, "supervised"), (24, "supervised"), (32, "preference"), *loop.report_phases()[3:]]
    assert [name for _, name in loop.report_phases()[3:]] == ["supervised", "preference"]


@pytest.mark.parametrize("change", ["rows", "cut-offs", "exclusion"])
def test_figures_of_another_protocol_are_not_shown(tmp_path, change):
    loop = make_loop(rounds=1, sft=PhaseSettings(epochs=0), diagnostic_rows=0)
    module, trainer, _ = run(tmp_path, loop)
    data = TinyData()
    if change == "rows":
        data.test_dataloader = lambda: TinyData._eval_loader(data, "val")
    elif change == "cut-offs":
        module.ks = (1, 2)
        module.eval_metrics.clear()
    else:
        module.decoding.exclude_seen = True
    trainer.test(module, data, verbose=False)
    assert loop.report_columns() == []
    section = loop.report_sections()[-1]
    named = {
        "rows": r"test rows: 13 rows .* before, 6 rows",
        "cut-offs": r"metrics: .*\[1, 3\]",
        "exclusion": 'decoding: .*"exclude_seen": false.* before',
    }[change]
    assert re.search(f"cannot be compared with this test: {named}", html.unescape(section.text))


def test_sections_for_the_report(tmp_path):
    loop = make_loop()
    module, trainer, _ = run(tmp_path, loop)
    trainer.test(module, TinyData(), verbose=False)
    assert [section.title for section in loop.report_sections()] == [
        "Rejected answers",
        "Greedy and sampled answers",
        "Exposure",
        "Most recommended titles",
    ]
    assert loop.report_columns()[0].values["hr_3"] > 0
    assert make_loop().report_columns() == []


@pytest.mark.parametrize("play", [SelfPlay(), SelfPlay(decode="sample"), SelfPlay(decode="beam_k_random", num_beams=3)])
def test_greedy_and_sampled_answers_are_compared(tmp_path, play, caplog):
    loop = make_loop(negatives=play, diagnostic_rows=20)
    with caplog.at_level(logging.INFO):
        module, *_ = run(tmp_path, loop)
    found = {(entry["round"], entry["titles"]): entry for entry in loop.state.history if entry["phase"] == "decoding"}
    assert set(found) == {(number, titles) for number in (1, 2) for titles in ("true", "greedy", "sample")}
    assert "round 2, greedy titles: distinct" in caplog.text
    for number in (1, 2):
        file = RoundFile.read(next(tmp_path.rglob(f"round_{number}.parquet")))
        pool = [loop._loader.pool[position] for position in file.positions[:20]]
        expected = answer_statistics([row["item_ids"][0] for row in pool], module.catalog.popularity)
        assert found[number, "true"] == {"phase": "decoding", "round": number, "titles": "true", **expected}
        if play.decode != "beam_k_random":
            own = answer_statistics([row[0] for row in file.items[:20]], module.catalog.popularity)
            assert found[number, play.decode] == {"phase": "decoding", "round": number, "titles": play.decode, **own}


@pytest.mark.parametrize(
    "changes", [{"diagnostic_rows": 0}, {"negatives": Uniform()}, {"negatives": SelfPlay(grounding="none", max_new_tokens=4)}, {"diagnostic_rows": 8}]
)
def test_comparing_decoding_changes_no_weights(tmp_path, changes):
    reference, changed = make_loop(**(changes | {"diagnostic_rows": 32})), make_loop(**changes)
    first, *_ = run(tmp_path / "reference", reference)
    second, *_ = run(tmp_path / "changed", changed)
    assert_equal(first, second)
    compared = any(entry["phase"] == "decoding" for entry in changed.state.history)
    assert compared == (changes == {"diagnostic_rows": 8})


def test_progress_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path)
    assert "round 1 sft: negatives: 32 of 32 rows" in caplog.text
    assert "round 2 dpo, reference" in caplog.text


def test_loop_without_rounds_does_not_check_their_rows(tmp_path):
    _, trainer, steps = run(tmp_path, make_loop(rounds=0, rows_per_round=10_000, warmup=PhaseSettings(epochs=1)))
    assert {kind for kind, *_ in steps} == {"warmup"}
    assert trainer.current_epoch == 1


def test_validation_metrics_belong_to_the_end_of_a_phase(tmp_path):
    """Validated after epochs 2, 4 and 6: in the warm-up of three epochs, and at the ends of the supervised phases."""
    loop = make_loop(warmup=PhaseSettings(epochs=3, lr=1e-2, warmup_steps=0), diagnostic_rows=0, compare_on="none")
    trainer = quiet_trainer(tmp_path, max_epochs=-1, check_val_every_n_epoch=2, callbacks=[loop])
    trainer.fit(make_module(dropout=0.0), TinyData(batch_size=4))
    validated = {(entry["phase"], entry["round"]): "val_hr_3" in entry for entry in loop.state.history if entry["phase"] != "negatives"}
    assert validated == {("warmup", 0): False, ("sft", 1): True, ("dpo", 1): False, ("sft", 2): True, ("dpo", 2): False}
