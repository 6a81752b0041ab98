"""Measure training steps of direct preference optimisation against TRL: samples per second of whole `fit` and `train` runs.

    python tests/benchmarks/preference_step.py [--device cuda --dtype bfloat16] [--json RESULT.json] [--repeats N] [--only SETTING] [--loss LOSS]

Both sides train the same random Llama on the same pairs, by default in float32, with AdamW, gradients clipped to 1, no dropout, no gradient
checkpointing, and reference log-probabilities computed before the first step. The settings are long prompts with short answers (160 and 12 tokens),
short prompts with longer answers (16 and 64), and long prompts with long answers (512 and 512). The sides are measured alternately. The time of a
step is measured from the end of the previous step to its own end, including data and logging. The benchmark first checks that losses and gradients
are equal, except for alpha-DPO (``--loss alpha_dpo``), which TRL does not have: its side then trains with the loss of DPO.

Peak memory is that of the device, or on a CPU the resident memory of a separate process for each side, without that of the process before the model
is loaded.

Without a GPU, TRL computes the language-model head at every position. The benchmark therefore also measures TRL with the head at the answers only, as
on a GPU. On a GPU, TRL uses its fastest settings: FlashAttention and the Liger kernels if they are installed (its padding-free batches are disabled
in 1.16). The last line is the ratio of samples per second, ours divided by TRL's, for the first setting and an unmodified TRL.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from devices import DTYPES, add_device_arguments, synchronize
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from malleable import DPO, Catalog, PhasedLoader, PreferenceBatch, ReferenceCache, collate
from malleable.datamodules.batch import Example, Vocabulary
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.adaptive_margin import AdaptiveMargin
from malleable.lightning_modules.losses.preference import Hinge, Sigmoid
from malleable.lightning_modules.losses.preference_base import PreferenceLoss

log = logging.getLogger("preference_step")

EOS, PAD = 0, 1
BETA, LR, MAX_GRAD_NORM, LOG_EVERY = 0.1, 1e-5, 1.0, 10


class StepTime(NamedTuple):
    """Wall time and processor time (sum over all threads) of a step in seconds."""

    wall_s: float
    cpu_s: float


collate_pairs = partial(collate, kind=PreferenceBatch)


@dataclass(frozen=True)
class Setting:
    """Model, batch and number of steps of one measurement."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    batch_size: int
    steps: int
    warmup: int = 2
    prompt_tokens: int = 160
    answer_tokens: int = 12
    device: str = "cpu"
    dtype: str = "float32"
    loss: str = "sigmoid"

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA device."""
        return torch.device(self.device).type == "cuda"


SETTINGS = (
    Setting("SmolLM2's shape, 8 layers", 576, 8, 9, 3, 1536, 49_152, batch_size=8, steps=4),
    Setting("from scratch", 128, 4, 4, 4, 384, 3_072, batch_size=32, steps=12, warmup=4),
    Setting("from scratch, short prompts", 128, 4, 4, 4, 384, 3_072, batch_size=16, steps=6, prompt_tokens=16, answer_tokens=64),
    Setting("SmolLM2's shape, 2 layers, short prompts", 576, 2, 9, 3, 1536, 49_152, batch_size=4, steps=3, prompt_tokens=16, answer_tokens=64),
    Setting("from scratch, long answers", 128, 4, 4, 4, 384, 3_072, batch_size=2, steps=4, prompt_tokens=512, answer_tokens=512),
    Setting("SmolLM2's shape, 2 layers, long answers", 576, 2, 9, 3, 1536, 49_152, batch_size=1, steps=2, prompt_tokens=512, answer_tokens=512),
)

# Our losses by the names that TRL gives them. TRL has no alpha-DPO: its side then has the loss of DPO, which has the same forward passes.
LOSSES: dict[str, Callable[[], PreferenceLoss]] = {
    "sigmoid": partial(Sigmoid, beta=BETA),
    "hinge": partial(Hinge, beta=BETA),
    "alpha_dpo": AdaptiveMargin,
}
ONLY_OURS = {"alpha_dpo": "sigmoid"}


def make_rows(setting: Setting) -> list[Example]:
    """Return random preference pairs whose answers end with the end-of-sequence token."""
    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return [rng.randrange(PAD + 1, setting.vocab_size) for _ in range(count)]

    def answer() -> list[int]:
        return [*words(setting.answer_tokens - 1), EOS]

    count = setting.batch_size * (setting.warmup + setting.steps)
    return [{"sample_id": row, "prompt": words(setting.prompt_tokens), "answers": [answer(), answer()]} for row in range(count)]


def make_model(setting: Setting, folder: Path) -> None:
    """Save a random model, and a tokenizer whose tokens are written as numbers: "7 8 9" has three tokens."""
    torch.manual_seed(0)
    sizes = asdict(setting)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    tokens = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = LlamaConfig(**{name: sizes[name] for name in names}, tie_word_embeddings=True, **tokens)
    with torch.device(setting.device):
        model = LlamaForCausalLM(config)
    model.to(DTYPES[setting.dtype]).save_pretrained(folder)
    vocabulary = {"</s>": EOS, "<pad>": PAD} | {str(token): token for token in range(PAD + 1, setting.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


class Ours:
    """Our side: `Trainer.fit` with the module DPO, as a user would write it."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.folder = folder

    def module(self) -> DPO:
        """Return the module."""
        catalog = Catalog(("nothing",), token_ids=((PAD + 1, EOS),), vocabulary=Vocabulary(self.setting.vocab_size, EOS, PAD))
        config = LanguageModelConfig(name=str(self.folder), dtype=self.setting.dtype)
        return DPO(config, catalog, loss=LOSSES[self.setting.loss](), tuning=Tuning(lr=LR, warmup_steps=0))

    def steps(self) -> list[StepTime]:
        """Train, and return the time of each step after the warm-up."""
        loader: PhasedLoader[Any] = PhasedLoader(make_rows(self.setting), self.setting.batch_size, collate_fn=collate_pairs)
        timer = OurTimer(self.setting)
        with tempfile.TemporaryDirectory() as run:
            trainer = Trainer(
                max_epochs=1,
                accelerator="gpu" if self.setting.on_gpu else "cpu",
                devices=1,
                precision="bf16-true" if self.setting.dtype == "bfloat16" else "32-true",
                gradient_clip_val=MAX_GRAD_NORM,
                callbacks=[ReferenceCache(loader=loader), timer],
                logger=CSVLogger(run),
                log_every_n_steps=LOG_EVERY,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self.module(), loader)
        return timer.steps(self.setting.warmup)

    def loss_and_gradients(self, state: dict[str, Tensor], rows: list[Example]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one batch under these weights."""
        module = self.module()
        module.configure_model()
        module.model.load_state_dict(state)
        loss = module.compute_loss(collate_pairs(rows)).loss
        loss.backward()
        return loss.item(), gradients(module.model)


class Theirs:
    """The side of TRL: `DPOTrainer.train` with the options of TRL for the same training.

    Args:
        setting: Model, batch and number of steps.
        folder: Folder with the model and the tokenizer.
        compact: Whether to compute the language-model head at the answers only, as TRL does if Triton is installed.
    """

    def __init__(self, setting: Setting, folder: Path, compact: bool = False) -> None:
        self.setting = setting
        self.folder = folder
        self.compact = compact

    def trainer(self, run: str, rows: list[Example]) -> DPOTrainer:
        """Return the trainer, which computes the reference log-probabilities before training."""
        options = DPOConfig(
            run,
            per_device_train_batch_size=self.setting.batch_size,
            num_train_epochs=1,
            learning_rate=LR,
            beta=BETA,
            loss_type=[ONLY_OURS.get(self.setting.loss, self.setting.loss)],
            max_length=None,
            max_grad_norm=MAX_GRAD_NORM,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=self.setting.dtype == "bfloat16",
            use_cpu=not self.setting.on_gpu,
            dataloader_pin_memory=self.setting.on_gpu,
            use_liger_kernel=self.setting.on_gpu and installed("liger_kernel"),
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        texts = [{"prompt": text(row["prompt"]), "chosen": " " + text(row["answers"][0]), "rejected": " " + text(row["answers"][1])} for row in rows]
        attention = "flash_attention_2" if self.setting.on_gpu and installed("flash_attn") else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPES[self.setting.dtype], attn_implementation=attention)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        return DPOTrainer(model, args=options, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)

    def steps(self) -> list[StepTime]:
        """Train, and return the time of each step after the warm-up."""
        timer = TheirTimer(self.setting)
        with tempfile.TemporaryDirectory() as run, self.head():
            trainer = self.trainer(run, make_rows(self.setting))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(timer)
            trainer.train()
        return timer.steps(self.setting.warmup)

    def head(self) -> AbstractContextManager[Any]:
        """Return a context in which TRL computes the head at the answers only if ``compact`` is set."""
        return mock.patch("trl.trainer.utils._use_triton", return_value=True) if self.compact else nullcontext()

    def loss_and_gradients(self, state: dict[str, Tensor], rows: list[Example]) -> tuple[float, dict[str, Tensor], list[list[float]]]:
        """Loss and gradients of one batch under these weights, and the reference log-probabilities ``(rows, 2)``."""
        with tempfile.TemporaryDirectory() as run:
            trainer = self.trainer(run, rows)
            trainer.model.load_state_dict(state)
            batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(rows))])
            assert batch["input_ids"].shape == (2 * len(rows), self.setting.prompt_tokens + self.setting.answer_tokens), (
                "TRL has other tokens than our side"
            )
            loss = trainer.compute_loss(trainer.model.train(), batch)
            loss.backward()
        reference = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], 1)
        return loss.item(), gradients(trainer.model), reference.tolist()


class StepTimer:
    """Record the times at which steps end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ends: list[StepTime] = []

    def note(self) -> None:
        """Record the end of a step."""
        synchronize(self.setting.device)
        self.ends.append(StepTime(time.perf_counter(), time.process_time()))

    def steps(self, warmup: int) -> list[StepTime]:
        """Return the times between the ends of successive steps, after the warm-up."""
        pairs = zip(self.ends[warmup - 1 :], self.ends[warmup:], strict=False)
        return [StepTime(end.wall_s - start.wall_s, end.cpu_s - start.cpu_s) for start, end in pairs]


class OurTimer(StepTimer, Callback):
    """Timer for a run of Lightning."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.note()


class TheirTimer(StepTimer, TrainerCallback):
    """Timer for a run of transformers."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.note()


def installed(name: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def text(tokens: Any) -> str:
    """Convert tokens to a text that the tokenizer converts back to the same tokens."""
    return " ".join("</s>" if token == EOS else str(token) for token in tokens)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients by parameter name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_equal(ours: Ours, theirs: Theirs, folder: Path) -> dict[str, float]:
    """Compare loss and gradients of both sides with weights that differ from the reference. With equal weights, the loss is always log 2.

    Raises:
        SystemExit: If the losses differ by more than 1e-4, or the gradients by more than 1e-4 of their norm.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    state = {name: value + 0.2 * value.std() * torch.randn_like(value) if value.dim() > 1 else value for name, value in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    rows = make_rows(ours.setting)[:2]
    their_loss, their_gradients, reference = theirs.loss_and_gradients(state, rows)
    our_loss, our_gradients = ours.loss_and_gradients(
        state, [{**row, "reference_logps": values} for row, values in zip(rows, reference, strict=True)]
    )
    assert our_gradients.keys() == their_gradients.keys()
    errors = {name: ((our_gradients[name] - theirs).norm() / theirs.norm()).item() for name, theirs in their_gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    log.info(
        "check: our loss is %.7f, that of TRL %.7f; gradients differ by at most %.1e of their norm (%s)", our_loss, their_loss, errors[worst], worst
    )
    if abs(our_loss - their_loss) > 1e-4 or errors[worst] > 1e-4:
        raise SystemExit("losses or gradients of the two sides differ by more than 1e-4; see the line above")
    return {"loss": our_loss, "trl_loss": their_loss, "gradient_error": errors[worst]}


def median(steps: list[StepTime]) -> StepTime:
    """Return the medians over steps."""
    return StepTime(*map(statistics.median, zip(*steps, strict=True)))


def make_sides(setting: Setting, folder: Path, compact: bool) -> dict[str, Ours | Theirs]:
    """Return the programs by name. With ``compact``, one is TRL with the head at the answers only, which it always uses on a GPU."""
    sides: dict[str, Ours | Theirs] = {"ours": Ours(setting, folder), "trl": Theirs(setting, folder)}
    return sides | ({"trl_compact": Theirs(setting, folder, compact=True)} if compact else {})


def resident_peak_gib(setting: Setting, side: str, folder: Path) -> float:
    """Train one side on a CPU in a process; return its peak of resident memory, above that before the model is loaded, in GiB."""
    command = [sys.executable, __file__, "--peak", side, str(folder), json.dumps(asdict(replace(setting, warmup=1, steps=1)))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_resident_peak(side: str, folder: str, setting: str) -> None:
    """Train one side, and print the peak of the resident memory of this process."""
    program = make_sides(Setting(**json.loads(setting)), Path(folder), compact=True)[side]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program.steps()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)  # noqa: T201


def measure(setting: Setting, repeats: int, compact: bool = True) -> dict[str, Any]:
    """Measure one setting; ``compact`` as in :func:`make_sides`."""
    log.info("%s (prompt %d tokens, answers %d):", setting.name, setting.prompt_tokens, setting.answer_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(setting, folder)
        sides = make_sides(setting, folder, compact)
        # In half precision and with other kernels, the sides round differently. Therefore, they are compared in float32 on a CPU only.
        comparable = setting.dtype == "float32" and not setting.on_gpu and setting.loss not in ONLY_OURS
        equality = check_equal(sides["ours"], sides["trl"], folder) if comparable else {}
        # Alternately, so that other load on the machine affects all sides.
        runs, peaks = [], {}
        for _ in range(repeats):
            runs.append({})
            for side, program in sides.items():
                if setting.on_gpu:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                runs[-1][side] = program.steps()
                if setting.on_gpu:
                    peaks[side] = torch.cuda.max_memory_allocated() / 2**30
        if not setting.on_gpu:
            peaks = {side: resident_peak_gib(setting, side, folder) for side in sides}
    figures: dict[str, Any] = {**asdict(setting), **equality, "peak_gib": peaks}
    medians = {side: median([step for run in runs for step in run[side]]) for side in sides}
    for side, step in medians.items():
        figures[side] = {**step._asdict(), "samples_per_s": setting.batch_size / step.wall_s, "runs": [run[side] for run in runs]}
    for side in sides.keys() - {"ours"}:
        figures[f"{side}_ratio"] = medians[side].wall_s / medians["ours"].wall_s
        figures[f"{side}_cpu_ratio"] = medians[side].cpu_s / medians["ours"].cpu_s
    return figures


def report(figures: dict[str, Any]) -> None:
    """Log the figures of a setting."""
    names = {"ours": "ours", "trl": "TRL", "trl_compact": "TRL with the head at the answers only"}
    sides = [side for side in names if side in figures]
    log.info("  samples/s: %s", ", ".join(f"{names[side]} {figures[side]['samples_per_s']:.2f}" for side in sides))
    log.info("  peak memory in GiB: %s", ", ".join(f"{names[side]} {figures['peak_gib'][side]:.2f}" for side in sides))
    for side in sides[1:]:
        name = names[side]
        log.info("  ratio to %s: %.2f (processor time: %.2f)", name, figures[f"{side}_ratio"], figures[f"{side}_cpu_ratio"])


def main() -> None:
    """Measure all settings. The last line is the ratio of the first setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(tempfile.gettempdir()) / "preference_step.json", help="output file")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of each side")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(SETTINGS)), help="indices of the settings to measure, from 0")
    parser.add_argument("--loss", default="sigmoid", choices=LOSSES, help="loss of both sides, except alpha_dpo")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # of the processes in which memory is measured
    add_device_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    if arguments.peak:
        print_resident_peak(*arguments.peak)
        return
    results = []
    for number in arguments.only:
        setting = replace(SETTINGS[number], device=arguments.device, dtype=arguments.dtype, loss=arguments.loss)
        results.append(measure(setting, arguments.repeats, compact=not setting.on_gpu))
        report(results[-1])
    figures = {"threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__, "settings": results}
    arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    log.info("wrote the figures to %s\nratio: %.2f", arguments.json, results[0]["trl_ratio"])


if __name__ == "__main__":
    main()
