"""Self-play training of a recommender: alternating supervised and preference phases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from malleable.callbacks.reference import phased_loader, reference_logps
from malleable.callbacks.report.comparison import SelfPlayComparison, evaluate_recommender
from malleable.callbacks.report.logged import newly_logged
from malleable.callbacks.report.page import Column, Section
from malleable.callbacks.report.round_curves import validation_errors
from malleable.callbacks.restart import finish_epoch
from malleable.callbacks.run_files import find_copies, run_folder
from malleable.callbacks.self_play.limits import check_limits, check_rounds
from malleable.callbacks.self_play.phases import Phase, PhaseSettings, SelfPlayState, plan_phases, reset_moments
from malleable.callbacks.self_play.round_file import RoundFile, draw_positions
from malleable.callbacks.self_play.round_negatives import choose_negatives, compare_decoding
from malleable.datamodules.loading import PhasedLoader, RowView, row_tokens, sample_ids
from malleable.datamodules.negative_samplers import NegativeSampler, SelfPlay
from malleable.lightning_modules.functional.schedule import warmup_decay
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.losses.preference_base import PreferenceLoss

log = logging.getLogger(__name__)


class SelfPlayLoop(Callback):
    """Alternate supervised and preference phases, with the model's own answers as rejected answers.

    The run starts with a supervised warm-up, followed by ``rounds`` rounds. A round draws rows without replacement, generates answers of the model,
    trains on the true titles (``sft``), computes the reference log-probabilities, and trains on pairs of true and generated titles (``dpo``). Each
    phase starts with a new optimizer state and has its own learning rate. The loop sets the number of epochs.

    The data of a round is written to ``self_play/round_<n>.parquet`` and ``round_<n>_pairs.parquet`` in the run folder. With these files and the
    checkpoint, an interrupted run can be resumed with the same result.

    Args:
        rounds: Number of rounds, K in the paper; 0 for the warm-up only.
        rows_per_round: Number of rows drawn for a round; ``None`` uses all rows in each round.
        warmup: Initial supervised phase.
        sft: Supervised phase of a round.
        dpo: Preference phase of a round.
        negatives: Sampler of rejected answers, see :mod:`malleable.datamodules.negative_samplers`. Default: :class:`SelfPlay`. ``Uniform`` and
            ``Popularity`` are for control experiments.
        negatives_from: Model for the rejected answers: ``pre_round`` for the model at the start of the round, as in the released code; ``post_sft``
            for the model after the supervised phase.
        keep_identical: Whether to keep or drop rows whose rejected answer is the true answer. They have no gradient.
        compare_on: Split on which the model is evaluated after the warm-up, for comparison in the report; ``none`` omits it.
        loader: Training loader; needed only without a data module of this package.
        diagnostic_rows: Number of rows of each round for which the log and the report compare greedy and sampled answers with the true titles: number
            of distinct titles, share of the three most frequent titles, mean popularity. The decoding mode that ``negatives`` does not use needs an
            additional pass; 0 omits the comparison. Used only for :class:`SelfPlay` with ``grounding='trie'``.
        seed: Random seed.

    Source:
        Gao et al. (2025), SPRec, arXiv:2412.09243, Algorithm 1, and its released code.
        Differs: rows are drawn without replacement until the pool is used up, and negatives are real items; ``keep_identical='keep'`` and
        ``SelfPlay(grounding='none')`` give the released behaviour.
    """

    def __init__(
        self,
        rounds: int = 5,
        rows_per_round: int | None = 2048,
        warmup: PhaseSettings | None = None,
        sft: PhaseSettings | None = None,
        dpo: PhaseSettings | None = None,
        negatives: NegativeSampler | None = None,
        negatives_from: Literal["pre_round", "post_sft"] = "pre_round",
        keep_identical: Literal["drop", "keep"] = "drop",
        compare_on: Literal["test", "val", "none"] = "test",
        loader: PhasedLoader[Any] | None = None,
        diagnostic_rows: int = 256,
        seed: int = 0,
    ) -> None:
        if rounds < 0:
            raise ValueError(f"rounds must be >= 0, got {rounds}")
        if rows_per_round is not None and rows_per_round < 1:
            raise ValueError(f"rows_per_round must be >= 1 or null, got {rows_per_round}")
        self.rounds = rounds
        self.rows_per_round = rows_per_round
        if diagnostic_rows < 0:
            raise ValueError(f"diagnostic_rows must be >= 0, got {diagnostic_rows}")
        self.settings = {
            "warmup": warmup or PhaseSettings(epochs=4, lr=3e-4),
            "sft": sft or PhaseSettings(),
            "dpo": dpo or PhaseSettings(),
        }
        self.negatives = negatives or SelfPlay()
        self.negatives_from = negatives_from
        self.keep_identical = keep_identical
        self.compare_on = compare_on
        self.diagnostic_rows = diagnostic_rows
        self.seed = seed
        self.state = SelfPlayState()
        self.phases = plan_phases(rounds, {name: settings.epochs for name, settings in self.settings.items()})
        self._loader = loader
        self._cached: RoundFile | None = None
        self._pad_token_id = 0
        self._folder = Path()
        self._copies: Callable[[str], list[Path]] = lambda name: [Path(name)]
        self._comparison = SelfPlayComparison()
        self._earlier: dict[str, Any] = {}
        if not self.phases:
            raise ValueError("the loop has no epochs: set epochs of the warm-up, or at least one round")
        if self.settings["dpo"].epochs > 1:
            rank_zero_warn(
                f"{self.settings['dpo'].epochs} preference epochs per round: with beta <= 1/2 the exact optimum of a round moves away from the data, "
                "so the model can drift in long phases. Check div_ratio, or_ratio and the chosen log-probabilities, or set epochs of `dpo` to 1"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return dict(vars(self.state))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the interrupted run, and set the rows of the interrupted phase."""
        self.state = SelfPlayState(**state_dict)
        if self.state.path is not None:
            self.state.path = "/".join(Path(self.state.path).parts[-2:])  # earlier versions stored it relative to the working directory
        self._cached = None
        if self._loader is not None and self.state.epoch >= 0:
            self._set_phase_rows()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module and Trainer, and set the number of epochs."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "generate_negatives"):
            raise MisconfigurationException(
                f"SelfPlayLoop needs a module with the method `generate_negatives`, such as SPRec; {type(pl_module).__name__} does not have it"
            )
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_limits(trainer, self.phases)
            trainer.fit_loop.max_epochs = len(self.phases)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self._folder = run_folder(trainer)
        self._copies = partial(find_copies, trainer, self._folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the rows of the first phase, or of the interrupted phase."""
        if trainer.lr_scheduler_configs:
            own = getattr(pl_module, "lr_scheduler", None) is None
            remedy = f"{type(pl_module).__name__} has its own schedule; use SPRec, which has none" if own else "omit lr_scheduler"
            raise MisconfigurationException(f"SelfPlayLoop sets the learning rates; {remedy}")
        self._loader = phased_loader(trainer, self._loader, type(self).__name__)
        rounds = {phase.kind: self._rows_per_step(self._loader, phase.kind) for phase in self.phases if phase.round}
        check_rounds(rounds, len(draw_positions(sample_ids(self._loader.pool), self.rows_per_round, 1, self.seed)) if rounds else 0)
        vocabulary = cast("LanguageModel", pl_module).vocabulary
        self._pad_token_id = 0 if vocabulary is None else vocabulary.pad_token_id
        if self.state.epoch >= 0:
            self._set_phase_rows()
        elif trainer.ckpt_path is None:
            self._prepare(trainer, cast("LanguageModel", pl_module), 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish an epoch that was interrupted after its last step, because the hook at its end prepares the next phase."""
        self._copy_round(trainer)
        finish_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the optimizer and a stateful loss at the start of a phase."""
        phase = self.phases[trainer.current_epoch]
        if phase.epoch == 0:
            self._earlier, self.state.figures = dict(trainer.callback_metrics), {}
            self.state.marks.append([trainer.global_step, "preference" if phase.kind == "dpo" else "supervised"])
            for optimizer in trainer.optimizers:
                reset_moments(optimizer)
            if isinstance(loss := getattr(pl_module, "loss", None), PreferenceLoss):
                loss.reset()
            rank_zero_info(f"{self._name(phase)}: {self._steps(phase)} steps on {len(self._rows())} rows")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step."""
        phase = self.phases[trainer.current_epoch]
        settings = self.settings[phase.kind]
        loader = self._loader
        assert loader is not None
        step = phase.epoch * loader.num_steps + batch_idx // loader.accumulation
        rate = settings.lr * warmup_decay(step, self._steps(phase), settings.warmup_steps, settings.decay)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        pl_module.log("train_lr", rate, batch_size=1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the metrics of the phase before a checkpoint is saved after its last step."""
        if trainer.is_last_batch:
            self._update_figures(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that the model at the end of the epoch is validated, and the standard errors of its metrics."""
        if trainer.is_last_batch and not trainer.sanity_checking:
            self.state.validated = trainer.current_epoch
            self.state.figures |= validation_errors(pl_module)

    def _update_figures(self, trainer: Trainer) -> None:
        self.state.figures |= {key: float(value) for key, value in newly_logged(trainer.callback_metrics, self._earlier).items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a finished phase, and prepare the next one, because the Trainer reads its rows before the next epoch starts."""
        epoch = trainer.current_epoch
        phase = self.phases[epoch]
        last = epoch + 1 == len(self.phases)
        if last or self.phases[epoch + 1].epoch == 0:
            self._update_figures(trainer)
            self.state.finish(phase, epoch)
        if phase.kind == "warmup" and (last or self.phases[epoch + 1].kind != "warmup"):
            self._evaluate_supervised(trainer, cast("LanguageModel", pl_module))
        if not last and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._prepare(trainer, cast("LanguageModel", pl_module), epoch + 1)

    def _prepare(self, trainer: Trainer, module: LanguageModel, epoch: int) -> None:
        """Compute and set the rows of an epoch, on all ranks."""
        agreed = trainer.strategy.broadcast(epoch)
        if agreed != epoch:
            raise RuntimeError(f"rank {trainer.global_rank} prepares epoch {epoch}, but rank 0 prepares epoch {agreed}; restart the run")
        loader, phase = self._loader, self.phases[epoch]
        assert loader is not None
        if phase.epoch == 0:
            if phase.kind == "warmup":
                self.state.path = None
            elif self._starts_round(epoch):
                self._draw_round(trainer, module, loader, phase)
            if phase.kind == "dpo":
                self._complete_pairs(trainer, module, loader, phase)
        self.state.epoch = epoch
        self._set_phase_rows()

    def _rows_per_step(self, loader: PhasedLoader[Any], kind: str) -> int:
        return loader.rows_per_step // loader.batch_factor * self.settings[kind].batch_factor

    def _starts_round(self, epoch: int) -> bool:
        return epoch == 0 or self.phases[epoch - 1].round != self.phases[epoch].round

    def _draw_round(self, trainer: Trainer, module: LanguageModel, loader: PhasedLoader[Any], phase: Phase) -> None:
        """Draw the rows of a round, and choose its negatives unless this is done after the supervised phase."""
        ids = sample_ids(loader.pool)
        positions = draw_positions(ids, self.rows_per_round, phase.round, self.seed)
        file = RoundFile(positions, ids[positions].tolist())
        if self.negatives_from != "post_sft" and self.settings["dpo"].epochs:
            self._choose_negatives(trainer, module, loader, phase, file)
        self._write(trainer, phase, file)

    def _choose_negatives(self, trainer: Trainer, module: LanguageModel, loader: PhasedLoader[Any], phase: Phase, file: RoundFile) -> None:
        rows = RowView(loader.pool, file.positions)
        seed = (self.seed, phase.round)
        file.items, file.answers = choose_negatives(trainer, module, rows, loader, self.negatives, seed, self._name(phase))
        self._log_figures(trainer, phase, "negatives", file.figures(rows, module.catalog))
        if self.diagnostic_rows and isinstance(self.negatives, SelfPlay) and self.negatives.grounding == "trie":
            found = compare_decoding(trainer, module, loader, file, self.diagnostic_rows, self.negatives, seed, self._name(phase))
            for titles, figures in found.items():
                self._log_figures(trainer, phase, "decoding", figures, titles)

    def _log_figures(self, trainer: Trainer, phase: Phase, kind: str, figures: dict[str, float], titles: str = "") -> None:
        """Log statistics of a round, and store them for the report."""
        heading = f"round {phase.round}{titles and f', {titles} titles'}"
        rank_zero_info(f"{heading}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        for logger in trainer.loggers:
            logger.log_metrics({f"selfplay/{titles and titles + '/'}{name}": value for name, value in figures.items()}, step=trainer.global_step)
        self.state.history.append({"phase": kind, "round": phase.round, **({"titles": titles} if titles else {}), **figures})

    def _complete_pairs(self, trainer: Trainer, module: LanguageModel, loader: PhasedLoader[Any], phase: Phase) -> None:
        """Complete the pairs of a round: negatives if they are missing, removal of identical rows, and the reference if the loss needs it."""
        file = self._file()
        if file.answers is None:
            self._choose_negatives(trainer, module, loader, phase, file)
        if self.keep_identical == "drop":
            file = self._without_identical(loader, phase, file)
        loss = getattr(module, "loss", None)
        if not isinstance(loss, PreferenceLoss) or loss.needs_reference:
            pairs = file.pairs(loader.pool, self._pad_token_id)
            file.reference = reference_logps(trainer, module, pairs, loader, f"{self._name(phase)}, reference").tolist()
        self._write(trainer, phase, file, pairs=True)

    def _without_identical(self, loader: PhasedLoader[Any], phase: Phase, file: RoundFile) -> RoundFile:
        """Remove rows whose rejected answer is the true answer, unless the remaining rows are too few for an optimizer step."""
        kept = file.without_identical(RowView(loader.pool, file.positions))
        if len(kept.positions) >= self._rows_per_step(loader, "dpo"):
            return kept
        rank_zero_warn(
            f"round {phase.round}: the rejected answer differs from the true answer in only {len(kept.positions)} of {len(file.positions)} rows, too "
            "few for an optimizer step; identical rows are kept, but have no effect. More rounds do not change the model; lower `rounds`"
        )
        return file

    def _current_rows(self, loader: PhasedLoader[Any], phase: Phase) -> Any:
        if phase.kind == "dpo":
            return self._file().pairs(loader.pool, self._pad_token_id)
        if phase.kind == "sft":
            return RowView(loader.pool, self._file().positions)
        settings = self.settings["warmup"]
        rows = loader.pool if settings.view == "answer" else loader.view(settings.view)
        return rows if settings.rows is None else RowView(rows, draw_positions(sample_ids(rows), settings.rows, 0, self.seed))

    def _set_phase_rows(self) -> None:
        """Set the rows of the current phase in the loader."""
        assert self._loader is not None
        phase = self.phases[self.state.epoch]
        rows = self._current_rows(self._loader, phase)
        self._loader.set_rows(rows, row_tokens(rows), self.settings[phase.kind].batch_factor)
        if phase.kind == "warmup" and not self._loader.num_steps:
            # Lightning would end such a run without an error, and the initial weights would be exported.
            raise MisconfigurationException(
                f"the warm-up has {len(rows)} rows, but an optimizer step needs {self._loader.rows_per_step}; lower global_batch_size and "
                f"batch_size{', or pack_length, because several histories are packed into a row' if self.settings['warmup'].view == 'packed' else ''}"
            )

    def _rows(self) -> Any:
        assert self._loader is not None
        return self._loader.dataset

    def _steps(self, phase: Phase) -> int:
        assert self._loader is not None
        return self.settings[phase.kind].epochs * self._loader.num_steps

    @staticmethod
    def _name(phase: Phase) -> str:
        return "warm-up" if phase.kind == "warmup" else f"round {phase.round} {phase.kind}"

    def _write(self, trainer: Trainer, phase: Phase, file: RoundFile, pairs: bool = False) -> None:
        # The pairs are written to another file, because earlier checkpoints still refer to the file with the drawn rows.
        self.state.path = f"self_play/round_{phase.round}{'_pairs' if pairs else ''}.parquet"
        if trainer.is_global_zero:
            file.write(self._folder / self.state.path)
        trainer.strategy.barrier("round file")
        self.state.digest = file.digest()
        self._cached = file

    def _file(self) -> RoundFile:
        if self._cached is None:
            assert self.state.path is not None
            self._cached = RoundFile.read_first(self._copies(self.state.path), self.state.digest)
        return self._cached

    def _copy_round(self, trainer: Trainer) -> None:
        """Copy the file of the current round from the interrupted run to the folder of this run, for later checkpoints."""
        if self.state.path is None or trainer.ckpt_path is None:
            return
        path, file = self._folder / self.state.path, self._file()
        if trainer.is_global_zero and self._copies(self.state.path)[0].resolve() != path.resolve():
            file.write(path)

    def _evaluate_supervised(self, trainer: Trainer, module: LanguageModel) -> None:
        """Evaluate the model after the warm-up, for the column "supervised only" of the report; without rounds, it is the tested model."""
        datamodule = getattr(trainer, "datamodule", None)
        skipped = self.compare_on == "none" or not any(phase.round for phase in self.phases)
        if skipped or datamodule is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rank_zero_info(f"evaluating the supervised model on the {self.compare_on} split")
        loader = getattr(datamodule, f"{self.compare_on}_dataloader")()
        self.state.before = evaluate_recommender(trainer, module, loader)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count the recommendations of the tested model."""
        if self.state.before:
            self._comparison.start(cast("LanguageModel", pl_module))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the recommendations of the tested model."""
        self._comparison.count(outputs, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the evaluation protocol with that of the model after the warm-up."""
        self._comparison.finish(trainer, cast("LanguageModel", pl_module), self.state.before)

    def report_columns(self) -> list[Column]:
        """Return the metrics of the model after the warm-up that can be compared with those of the test."""
        return self._comparison.columns(self.state.history, self.state.before) if self.compare_on == "test" else []

    def report_phases(self) -> list[tuple[int, str]]:
        """Return the first optimizer step of each phase, and whether the phase is supervised or uses preferences."""
        return [(step, name) for step, name in self.state.marks]

    def report_sections(self) -> list[Section]:
        """Return sections with statistics and curves of the rounds, and the recommendations before and after self-play."""
        return self._comparison.sections(self.state.history, self.state.before)
