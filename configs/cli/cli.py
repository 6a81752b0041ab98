"""``malleable fit|validate|test|predict``: Lightning's command line, with recipes by name and checks of checkpoints and options."""

from __future__ import annotations

import atexit
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

import malleable
from malleable.callback_options import CallbackOption, split_callback_options
from malleable.callbacks.last_checkpoint import LastCheckpoint
from malleable.callbacks.line_progress import LineProgress, LossProgressBar
from malleable.callbacks.predictions import DescribesPredictions, PredictionWriter
from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.checkpoints import AtomicCheckpointIO, as_layer, consolidate, differences, find_checkpoint, other_settings, stored_model
from malleable.datamodules.files.run_folders import Wanted
from malleable.datamodules.stored_identity import stores_data
from malleable.layers import RecipeFile, Replace, given_options, is_given, mark_replacements
from malleable.lightning_modules.stored_weights import foreign_classes
from malleable.option_errors import OptionParser, print_help, take_help
from malleable.recipes import FOLDER, recipe_name
from malleable.runs import RunFolder, claimed_folders
from malleable.unused import check_unused

log = logging.getLogger(__name__)


class MalleableCLI(LightningCLI):
    """Lightning's command line in subclass mode; ``base/fit.yaml`` holds the defaults of every configuration.

    Classes of malleable have short names; any other LightningModule or LightningDataModule is given by its import path.
    """

    config: Namespace
    _words: list[str]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose ``--config`` knows the packaged recipes."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="A YAML file, or the name of a recipe; later ones are laid over earlier ones.")
        parser.add_argument("--replace", action=Replace)
        parser.add_argument("--callback", action=CallbackOption)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options; every command accepts all, so that one recipe serves all commands."""
        switch: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}
        parser.add_argument("--test_after_fit", **switch, help="After `fit`, test the checkpoint that the run registered as its best.")
        parser.add_argument("--allow_untrained", **switch, help="Let `validate`, `test` and `predict` run without a checkpoint.")
        parser.add_argument("--extend_catalog", **switch, help="Add items that the checkpoint's catalogue lacks behind its own.")
        parser.add_class_arguments(ModelCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, with the values of a checkpoint as defaults of the model.

        Settings that affect the output of the weights (settings of the model, tokenizer, template and catalogue) are taken from the checkpoint. They
        override values of a recipe; other values on the command line are an error.
        """
        words = [str(word) for word in args] if isinstance(args, list) else []
        words, part = take_help(words)
        self._words = words
        self.config = parser.parse_args(_prepared(words))
        if part:
            print_help(part, self.config[str(self.config.subcommand)])
        command = str(self.config.subcommand)
        config = self.config[command]
        if config.get("weights_only") is False:
            raise MisconfigurationException("--weights_only false would run code from a checkpoint; they are read as tensors and plain data only")
        if not config.ckpt_path:
            if config.extend_catalog:
                raise MisconfigurationException("--extend_catalog adds items to the catalogue of a checkpoint: give --ckpt_path")
            return
        ckpt_path = find_checkpoint(config.ckpt_path, self.runs, Wanted.of(json.loads(json.dumps(config.as_dict(), default=str))))
        readable = ckpt_path if command == "fit" else _readable(ckpt_path, config.trainer.strategy)
        words = self._with_stored_model(parser, words, ckpt_path)
        words += self._stored_data(words, readable)
        self.config = parser.parse_args(_prepared(words))
        self.config[command].ckpt_path = ckpt_path if command == "fit" else _readable(ckpt_path, self.config[command].trainer.strategy)

    def _with_stored_model(self, parser: LightningArgumentParser, words: list[str], ckpt_path: str) -> list[str]:
        """Add the model of a checkpoint as default, and its weight settings as the last configuration."""
        command = str(self.config.subcommand)
        stored = stored_model(ckpt_path)
        model = self.config[command].model
        if not stored:
            return words
        arguments = stored["init_args"]
        if foreign := foreign_classes(arguments, set(_texts(self.config[command].as_dict()))):
            raise MisconfigurationException(
                f"{ckpt_path}, or the config_fit.yaml of its run, names {foreign[0]}, which is not part of malleable; importing it could run code. "
                "If you trust it, name it in the recipe or on the command line"
            )
        if stored["class_path"] == model.class_path:
            start = words.index(command) + 1
            words = [*words[:start], "--config", json.dumps({"model": stored}, default=str), *words[start:]]
            model = parser.parse_args(_prepared(words))[command].model
            if changed := differences(model.as_dict(), stored):
                log.info("given values win over those of %s: %s", ckpt_path, changed)
        other = other_settings(model.init_args.as_dict(), arguments, getattr(resolve_name(model.class_path), "weight_settings", ()))
        options = given_options(words)
        for name, now, then in other:
            if is_given(f"model.{name}", options):
                raise MisconfigurationException(
                    f"--model.{name} is {now}, but the weights of {ckpt_path} were trained with {then} and need this value; omit the option"
                )
        if not other:
            return words
        log.info("settings of %s are used instead of the recipe's: %s", ckpt_path, ", ".join(f"{name} {then} ({now})" for name, now, then in other))
        layer = as_layer({name: then for name, _, then in other})
        return [*words, "--config", json.dumps({"model": {"class_path": model.class_path, "init_args": layer}}, default=str)]

    def _stored_data(self, words: list[str], ckpt_path: str) -> list[str]:
        """Return options that set tokenizer, template and catalogue of the data module to those of the checkpoint."""
        config = self.config[str(self.config.subcommand)]
        data = config.data
        if not (isinstance(data, Namespace) and getattr(resolve_name(data.class_path), "reads_checkpoints", False) and stores_data(ckpt_path)):
            if config.extend_catalog:
                raise MisconfigurationException(f"--extend_catalog: there is no stored catalogue in {ckpt_path}, or the data module cannot extend it")
            return []
        options = given_options(words)
        layer: dict[str, Any] = {}
        if not is_given("data.tokenizer", options):
            layer["tokenizer"] = ckpt_path
            if data.init_args.get("template") is not None and not is_given("data.template", options):
                layer["template"] = None
        if config.extend_catalog:
            layer["extend_catalog"] = True
        if layer:
            log.info("tokenizer, template and catalogue are those of %s", ckpt_path)
        return ["--config", json.dumps({"data": {"class_path": data.class_path, "init_args": layer}})] if layer else []

    def _parse_ckpt_path(self) -> None:
        """Disable the hook of Lightning (2.5.5 to 2.7) by which hyper-parameters of the checkpoint override given values."""

    @property
    def runs(self) -> Path:
        """Folder of the runs of this configuration, one ``version_*`` each."""
        config = self.config[str(self.config.subcommand)]
        names = [recipe_name(Path(str(path))) for path in config.config or [] if path]
        name = next((name for name in names if name), config.model.class_path.rpartition(".")[2])
        return Path(config.trainer.default_root_dir or "runs") / name

    def before_instantiate_classes(self) -> None:
        """Check the options, and give the run its folder."""
        command = str(self.subcommand)
        config = self.config[command]
        plain = json.loads(json.dumps(config.as_dict(), default=str))
        # A checkpoint's tokenizer takes the place of options that the recipe needs for its fit.
        check_unused(self._words, plain, files=command == "fit" and not config.ckpt_path)
        if command != "fit" and not config.ckpt_path and not config.allow_untrained:
            self._refuse_untrained(config.model.class_path)
        config.trainer.logger = self._loggers(config.trainer.logger)
        self.save_config_kwargs = {"config_filename": f"config_{command}.yaml", "overwrite": True}

    def _loggers(self, given: Any) -> Any:
        """Return the given loggers behind one that owns the run folder, unless a given one is of its kind or loggers are switched off."""
        if given is False:
            return given
        others = [] if given is None or given is True else given if isinstance(given, list) else [given]
        if any(_is_csv(logger) for logger in others):
            return given
        arguments = Namespace(save_dir=str(self.runs.parent), name=self.runs.name, version=None, prefix="", flush_logs_every_n_steps=10)
        own = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=arguments)
        return [own, *others] if others else own

    def _refuse_untrained(self, class_path: str) -> None:
        if getattr(resolve_name(class_path), "trains", True):
            raise MisconfigurationException(
                f"`{self.subcommand}` would measure {class_path.rpartition('.')[2]} with the weights it is built with; "
                f"give --ckpt_path (a file, or `last` or `best` of the latest run under {self.runs}), or --allow_untrained if that is meant"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer with a plain progress bar and the checkpoints of the ``checkpoint`` section, unless switched off or replaced."""
        config = self.config_init[str(self.subcommand)]
        given = config.trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            # The default of Lightning 2.6, rich, breaks when anything else draws.
            callbacks.append(LossProgressBar() if sys.stdout.isatty() else LineProgress())
        if config.trainer.enable_checkpointing is not False and not any(isinstance(callback, Checkpoint) for callback in callbacks):
            callbacks += self._checkpoints(config.checkpoint)
        if self.subcommand == "predict" and not any(isinstance(callback, (BasePredictionWriter, PredictionWriter)) for callback in callbacks):
            callbacks += _prediction_writer(config.model)
        trainer = super().instantiate_trainer(callbacks=[RunFolder(), *callbacks], **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _checkpoints(self, checkpoint: ModelCheckpoint) -> list[ModelCheckpoint]:
        """Return the callback of the ``checkpoint`` section, and one that saves every epoch as the last one.

        ``checkpoint.every_n_epochs`` limits the monitored checkpoints only: a run that is killed loses no more than an epoch.
        """
        if not checkpoint.save_last or checkpoint._every_n_train_steps or checkpoint._train_time_interval:
            return [checkpoint]
        checkpoint.save_last = None
        return [checkpoint, LastCheckpoint(checkpoint.dirpath)]

    def before_fit(self) -> None:
        """Check that the run ends.

        Raises:
            MisconfigurationException: If there is neither a limit nor a callback that ends the run.
        """
        trainer: Any = self.trainer
        if trainer.max_epochs == trainer.max_steps == -1 and not any(
            isinstance(each, (SelfPlayLoop, Timer, EarlyStopping)) for each in trainer.callbacks
        ):
            raise MisconfigurationException(
                "nothing would end this run: max_epochs is -1, which is meant for the callback SelfPlayLoop, and there is none; keep the recipe's "
                "callbacks, or give --trainer.max_epochs, --trainer.max_steps or --trainer.max_time"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        with claimed_folders(self.trainer):
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Test the checkpoint that the run registered as its result, including edits after training."""
        if not self.config.fit.test_after_fit or self.trainer.interrupted:
            return
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
        if path and getattr(self.trainer.strategy, "zero_stage_3", False):
            # DeepSpeed cannot load a stage-3 checkpoint without its optimizer.
            log.info("ZeRO stage 3: testing the weights in memory, not %s", path)
            path = ""
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None)


def _prepared(words: Sequence[str]) -> list[str]:
    """Return a command line for the parser, which does not know that classes drop arguments and that callbacks have names."""
    others, callbacks = split_callback_options(words)
    return [*mark_replacements(others), *callbacks]


def _readable(ckpt_path: str, strategy: Namespace | str) -> str:
    """Return a checkpoint that ``strategy`` can load: a DeepSpeed folder for ZeRO stages 1 and 2, otherwise one file."""
    stage = strategy.get("init_args.stage") if isinstance(strategy, Namespace) else None
    if stage == 3 and isinstance(strategy, Namespace):
        strategy.init_args.load_full_weights = True
    return consolidate(ckpt_path) if Path(ckpt_path).is_dir() and stage not in (1, 2) else ckpt_path


def _prediction_writer(model: LightningModule) -> list[PredictionWriter]:
    """Return the writer of the predictions of a model; ``[]``, with a warning, if the model does not describe its predictions."""
    if hasattr(model, "recommend") or isinstance(model, DescribesPredictions):
        return [PredictionWriter()]
    log.warning(
        "predictions of %s are not written: it has neither `recommend` nor `describe`; add a callback that writes them "
        "(lightning.pytorch.callbacks.BasePredictionWriter)", type(model).__name__,
    )  # fmt: skip
    return []


def run(words: Sequence[str]) -> MalleableCLI:
    """Run one command.

    Args:
        words: The command and its options.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # classes of the user's own files, named by path
    for name in dir(malleable):
        getattr(malleable, name)  # short names resolve among the classes that are imported
    parser_kwargs: dict[str, Any] = {"prog": "malleable", "description": "Train, measure and use models."}
    for command in MalleableCLI.subcommands():
        # Without a usage of its own, every error would begin with a page of options.
        usage = f"malleable {command} --config RECIPE [options]"
        parser_kwargs[command] = {"usage": usage, "default_config_files": [str(FOLDER / "base" / "fit.yaml")]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")  # Lightning 2.6 with torch 2.13
        warnings.filterwarnings("ignore", "The dirpath has changed")  # every command has a run folder of its own
        cli = MalleableCLI(auto_configure_optimizers=False, parser_class=OptionParser, parser_kwargs=parser_kwargs, args=list(words))
    if cli.trainer.log_dir and Path(cli.trainer.log_dir).is_dir():
        log.info("run folder: %s", cli.trainer.log_dir)
    atexit.register(_leave_process_group)
    return cli


def _is_csv(logger: Any) -> bool:
    class_path = logger.get("class_path") if isinstance(logger, Namespace) else None
    return class_path is not None and issubclass(resolve_name(class_path), CSVLogger)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _leave_process_group() -> None:
    """Stop the threads of gloo, which could abort the process at exit, so that a launcher would report a failed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
