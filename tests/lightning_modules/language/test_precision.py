"""Language-model methods under every precision of the Trainer: what works, what stays in float32, what is refused."""

import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import TOKENS, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, save_base

from malleable.callbacks.reference import ReferenceCache
from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.callbacks.self_play.phases import PhaseSettings
from malleable.datamodules.batch import PreferenceBatch, Vocabulary
from malleable.lightning_modules.language.causal_lm import CausalLM
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.dpo import DPO
from malleable.lightning_modules.recommendation.sft import SFT
from malleable.lightning_modules.recommendation.sprec import SPRec

METHODS = (SFT, DPO, SPRec, CausalLM)
# Precision of the Trainer, dtype of the weights, whether adapters train; then the methods that are tried in fast tests.
SUPPORTED = {
    ("32-true", "float32", False): (),
    ("bf16-mixed", "float32", False): (DPO,),
    ("16-mixed", "float32", False): (SPRec,),
    ("bf16-true", "float32", False): METHODS,
    ("64-true", "float32", False): (SPRec,),
    ("32-true", "bfloat16", True): (DPO,),
    ("bf16-mixed", "bfloat16", True): (SPRec,),
    ("bf16-mixed", "float32", True): (),
}
COMBINATIONS = [
    pytest.param(*combination, kind, marks=[] if kind in fast else [pytest.mark.slow], id="-".join([*map(str, combination), kind.__name__]))
    for combination, fast in SUPPORTED.items()
    for kind in METHODS
]
HALF = (torch.bfloat16, torch.float16)


class Watch(Callback):
    """Collect the dtypes of what must stay in float32 while a run goes on, and the first preference loss."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.first_preference: float | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._add(vars(batch).values())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(batch, PreferenceBatch) and self.first_preference is None:
            self.first_preference = outputs["loss"].item() * trainer.accumulate_grad_batches
        self._add([outputs["loss"]])
        if hasattr(pl_module.model, "peft_config"):
            trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            self._add(trained)
            for state in trainer.optimizers[0].state.values():
                self._add(state.values())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._evaluated(pl_module, outputs)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._evaluated(pl_module, outputs)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._add(outputs if isinstance(outputs, tuple) else [outputs])

    def _evaluated(self, pl_module, outputs):
        self._add(outputs or ())
        self._add(value for sums in pl_module._loss_sums.values() for value in sums.values())
        for metric in (metric for metrics in pl_module.eval_metrics.values() for metric in metrics.values()):
            for value in metric.metric_state.values():
                self._add(value if isinstance(value, list) else [value])

    def _add(self, values):
        self.dtypes |= {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}


class PairData(TinyData):
    """Rows with the title that comes behind the true one as the rejected answer."""

    def __init__(self) -> None:
        rows = [row | {"answers": [*row["answers"], TOKENS[(row["item_ids"][0] + 1) % 8]]} for row in tiny_rows(16)]
        super().__init__(train=[row | {"item_ids": [*row["item_ids"], (row["item_ids"][0] + 1) % 8]} for row in rows])


class TextData(TinyData):
    """The toy prompts as packed text."""

    vocabulary = Vocabulary(16, eos_token_id=1)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        rows = [
            {"sample_id": index, "input_ids": row["prompt"] * 2, "document_ids": [1] * 2 * len(row["prompt"])}
            for index, row in enumerate(tiny_rows(12))
        ]
        self.train_dataset = self.val_dataset = self.test_dataset = self.predict_dataset = rows

    def row_tokens(self):
        return [len(row["input_ids"]) - 1 for row in self.train_dataset]


def under(precision: str) -> dict[str, Any]:
    """Arguments of a CPU Trainer; Lightning takes bf16-mixed there when it is asked for 16-mixed."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}


def loop() -> SelfPlayLoop:
    phase = PhaseSettings(lr=1e-3, warmup_steps=0)
    return SelfPlayLoop(rounds=1, rows_per_round=16, warmup=phase, sft=phase, dpo=phase, compare_on="none", keep_identical="keep")


def method(kind: type, config: Any) -> tuple[Any, Any, list[Callback]]:
    """A module, its data and its callbacks."""
    if kind is CausalLM:
        return CausalLM(config, tuning=Tuning(lr=1e-3, warmup_steps=0)), TextData(), []
    data = PairData() if kind is DPO else TinyData(train=tiny_rows(16))
    callbacks: list[Callback] = {DPO: [ReferenceCache()], SPRec: [loop()]}.get(kind, [])
    return kind(config, ks=(1, 3), tuning=Tuning(lr=1e-3, warmup_steps=0)), data, callbacks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


def config_for(base: str, dtype: str, adapters: bool) -> Any:
    return lora(base, dropout=0.0, dtype=dtype) if adapters else tiny_config(dtype=dtype)


@pytest.mark.parametrize(("precision", "dtype", "adapters", "kind"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_runs_and_keeps_statistics_in_float32(tmp_path, base, precision, dtype, adapters, kind):
    """Fit, validate, test and predict; batches, losses, metric states, predictions, adapters and their moments are never in half precision."""
    torch.manual_seed(0)
    module, data, callbacks = method(kind, config_for(base, dtype, adapters))
    watch = Watch()
    # Self-play sets the number of epochs itself.
    limits = {"max_epochs": -1 if kind is SPRec else 2, "gradient_clip_val": 1.0}
    trainer = quiet_trainer(tmp_path, precision=precision, callbacks=[*callbacks, watch], enable_checkpointing=False, **limits)
    trainer.fit(module, data)
    (result,) = trainer.test(module, data, verbose=False)
    assert all(math.isfinite(value) for value in result.values())
    assert trainer.predict(module, data)
    assert not watch.dtypes.intersection(HALF), watch.dtypes
    if kind in (DPO, SPRec):
        # Activations are rounded alike in both, but not to the bit: rows lie otherwise in other batches.
        assert watch.first_preference == pytest.approx(math.log(2), abs=1e-6 if precision == "32-true" and dtype == "float32" else 5e-3)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("precision", "dtype", "adapters", "message"), [
    ("bf16-true", "bfloat16", True, r"precision='bf16-true' converts adapters and optimizer moments to bfloat16, .*dtype: bfloat16 and precision"),
    ("16-true", "float16", True, "precision='16-true' converts adapters and optimizer moments to float16"),
    ("16-true", "float32", False, r"cannot be trained in float16 \(precision='16-true'.* precision bf16-mixed or 16-mixed"),
    ("16-mixed", "float16", False, "cannot be trained in float16"),
])  # fmt: skip
def test_training_that_loses_steps_is_an_error(tmp_path, base, precision, dtype, adapters, message):
    module = SFT(config_for(base, dtype, adapters), catalog=tiny_catalog())
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, max_epochs=1, precision=precision, enable_checkpointing=False).fit(module, TinyData())
    assert module.model is None, "refused before the model is built"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "float32"), ("32-true", "bfloat16")])
def test_weights_that_train_in_bfloat16_are_warned_about(tmp_path, precision, dtype):
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, precision=precision, enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"trained in bfloat16 .* increased val_loss by 0.28"):
        trainer.fit(SFT(tiny_config(dtype=dtype)), TinyData())


def test_float32_copies_of_the_weights_lose_nothing(tmp_path, base, monkeypatch):
    """DeepSpeed trains such copies: nothing is refused there."""
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    module = SFT(config_for(base, "bfloat16", True), catalog=tiny_catalog())
    module.trainer = quiet_trainer(tmp_path, precision="bf16-true")
    module.setup("fit")


def test_a_model_in_half_precision_is_tested_without_warning(tmp_path, base):
    """Only training loses."""
    (result,) = quiet_trainer(tmp_path, precision="bf16-true").test(SFT(lora(base, dtype="bfloat16"), ks=(1, 3)), TinyData(), verbose=False)
    assert result["test_loss"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_fused_optimizers_are_clipped_under_mixed_precision(tmp_path, precision):
    """The gradient is clipped after the scale of mixed precision has been undone: a step of SGD is never longer than the rate."""
    module = SFT(tiny_config(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5, fused=True))
    trainer = quiet_trainer(
        tmp_path, max_steps=1, **under(precision), gradient_clip_val=0.01, limit_val_batches=0, enable_checkpointing=False, callbacks=[Before()]
    )
    trainer.fit(module, TinyData())
    after = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    length = (after - trainer.callbacks[0].weights).norm().item()
    assert length == pytest.approx(0.5 * 0.01, rel=1e-2)


class Before(Callback):
    """Keep the weights of the start."""

    def on_train_start(self, trainer, pl_module):
        self.weights = torch.cat([parameter.detach().flatten().clone() for parameter in pl_module.parameters()])
