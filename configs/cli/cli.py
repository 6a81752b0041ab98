"""Commands ``malleable fit|validate|test|predict``: LightningCLI with recipes by name and checks of checkpoints and options."""

from __future__ import annotations

import atexit
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint, EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

import malleable
from malleable.argument_checks import check_predict_options
from malleable.callback_options import CallbackOption, split_callback_options
from malleable.callbacks.last_checkpoint import LastCheckpoint
from malleable.callbacks.line_progress import LineProgress, LossProgressBar
from malleable.callbacks.predictions import DescribesPredictions, PredictionWriter
from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.checkpoints import AtomicCheckpointIO, changed_settings, consolidate, differences, find_checkpoint, nest, stored_model
from malleable.datamodules.files.run_folders import RunDescription
from malleable.datamodules.stored_identity import stores_data
from malleable.interruption import command_line, interrupting_signal, report
from malleable.layers import RecipeFile, Replace, given_options, is_given, mark_replacements
from malleable.lightning_modules.stored_weights import foreign_classes
from malleable.option_errors import OptionParser, print_help, split_help_option
from malleable.recipes import FOLDER, recipe_name
from malleable.runs import RunFolder, claimed_folders
from malleable.unused import check_unused

log = logging.getLogger(__name__)

# Packages of Lightning's loggers; one of each is sufficient.
LOGGER_PACKAGES = {
    "CometLogger": ("comet_ml",),
    "MLFlowLogger": ("mlflow",),
    "NeptuneLogger": ("neptune",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
}


class MalleableCLI(LightningCLI):
    """LightningCLI in subclass mode, with the default values of ``base/fit.yaml``.

    Classes of malleable are given by their names, other LightningModules and LightningDataModules by their import paths.
    """

    config: Namespace
    _argv: list[str]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser whose option ``--config`` accepts names of packaged recipes."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="A YAML file, or the name of a recipe. Later files override earlier ones.")
        parser.add_argument("--replace", action=Replace)
        parser.add_argument("--callback", action=CallbackOption)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of malleable. Each command accepts all of them, so that a recipe works with all commands."""
        switch: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}
        parser.add_argument("--test_after_fit", **switch, help="After `fit`, test the best checkpoint of the run.")
        parser.add_argument("--allow_untrained", **switch, help="Allow `validate`, `test` and `predict` without a checkpoint.")
        parser.add_argument("--extend_catalog", **switch, help="Append new items to the catalogue of the checkpoint.")
        parser.add_class_arguments(ModelCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments. With a checkpoint, its stored values are the default values of the model.

        Settings that affect the output of the weights (settings of the model, tokenizer, template and catalogue) are always taken from the
        checkpoint. They override the values of a recipe. A different value on the command line is an error.
        """
        argv = [str(argument) for argument in args] if isinstance(args, list) else []
        argv, part = split_help_option(argv)
        self._argv = argv
        self.config = parser.parse_args(_prepare_arguments(argv))
        if part:
            print_help(part, self.config[str(self.config.subcommand)])
        command = str(self.config.subcommand)
        config = self.config[command]
        if config.get("weights_only") is False:
            raise MisconfigurationException(
                "--weights_only false is not allowed, because a checkpoint could then run code; checkpoints are read as tensors and plain data only"
            )
        if not config.ckpt_path:
            if config.extend_catalog:
                raise MisconfigurationException("--extend_catalog adds items to the catalogue of a checkpoint; add --ckpt_path")
            return
        ckpt_path = find_checkpoint(config.ckpt_path, self.runs, RunDescription.from_config(json.loads(json.dumps(config.as_dict(), default=str))))
        readable = ckpt_path if command == "fit" else _loadable_checkpoint(ckpt_path, config.trainer.strategy)
        argv = self._add_stored_model(parser, argv, ckpt_path)
        argv += self._stored_data_options(argv, readable)
        self.config = parser.parse_args(_prepare_arguments(argv))
        self.config[command].ckpt_path = ckpt_path if command == "fit" else _loadable_checkpoint(ckpt_path, self.config[command].trainer.strategy)

    def _add_stored_model(self, parser: LightningArgumentParser, argv: list[str], ckpt_path: str) -> list[str]:
        """Add the model of a checkpoint as the first configuration, and its weight settings as the last one."""
        command = str(self.config.subcommand)
        stored = stored_model(ckpt_path)
        model = self.config[command].model
        if not stored:
            return argv
        arguments = stored["init_args"]
        if foreign := foreign_classes(arguments, set(_strings(self.config[command].as_dict()))):
            raise MisconfigurationException(
                f"{ckpt_path}, or config_fit.yaml of its run, contains the class {foreign[0]}, which is not part of malleable; importing it could "
                "run code. If you trust it, give the class in the recipe or on the command line"
            )
        if stored["class_path"] == model.class_path:
            start = argv.index(command) + 1
            argv = [*argv[:start], "--config", json.dumps({"model": stored}, default=str), *argv[start:]]
            model = parser.parse_args(_prepare_arguments(argv))[command].model
            if changed := differences(model.as_dict(), stored):
                log.info("values of the recipe and the command line override those of %s: %s", ckpt_path, changed)
        settings = changed_settings(model.init_args.as_dict(), arguments, getattr(resolve_name(model.class_path), "weight_settings", ()))
        options = given_options(argv)
        for name, now, then in settings:
            if is_given(f"model.{name}", options):
                raise MisconfigurationException(f"--model.{name} is {now}, but the weights of {ckpt_path} were trained with {then}; omit the option")
        if not settings:
            return argv
        values = ", ".join(f"{name} {then} (recipe: {now})" for name, now, then in settings)
        log.info("settings of %s override those of the recipe: %s", ckpt_path, values)
        layer = nest({name: then for name, _, then in settings})
        return [*argv, "--config", json.dumps({"model": {"class_path": model.class_path, "init_args": layer}}, default=str)]

    def _stored_data_options(self, argv: list[str], ckpt_path: str) -> list[str]:
        """Return options that set tokenizer, template and catalogue of the data module to those of the checkpoint."""
        config = self.config[str(self.config.subcommand)]
        data = config.data
        if not (isinstance(data, Namespace) and getattr(resolve_name(data.class_path), "reads_checkpoints", False) and stores_data(ckpt_path)):
            if config.extend_catalog:
                raise MisconfigurationException(
                    f"--extend_catalog: {ckpt_path} contains no catalogue, or the data module cannot extend it; omit the option"
                )
            return []
        options = given_options(argv)
        layer: dict[str, Any] = {}
        if not is_given("data.tokenizer", options):
            layer["tokenizer"] = ckpt_path
            if data.init_args.get("template") is not None and not is_given("data.template", options):
                layer["template"] = None
        if config.extend_catalog:
            layer["extend_catalog"] = True
        if layer:
            log.info("tokenizer, template and catalogue are read from %s", ckpt_path)
        return ["--config", json.dumps({"data": {"class_path": data.class_path, "init_args": layer}})] if layer else []

    def _parse_ckpt_path(self) -> None:
        """Disable the hook of Lightning 2.5.5 to 2.7 that overrides given values by hyper-parameters of the checkpoint."""

    @property
    def runs(self) -> Path:
        """Folder of the runs of this configuration, with one subfolder ``version_*`` for each run."""
        config = self.config[str(self.config.subcommand)]
        names = [recipe_name(Path(str(path))) for path in config.config or [] if path]
        name = next((name for name in names if name), config.model.class_path.rpartition(".")[2])
        return Path(config.trainer.default_root_dir or "runs") / name

    def before_instantiate_classes(self) -> None:
        """Check the options, and set the run folder."""
        command = str(self.subcommand)
        config = self.config[command]
        plain = json.loads(json.dumps(config.as_dict(), default=str))
        # With a checkpoint, options such as data.vocab_size have no effect, but the recipe needs them for `fit`.
        check_unused(self._argv, plain, files=command == "fit" and not config.ckpt_path)
        if command != "fit" and not config.ckpt_path and not config.allow_untrained:
            self._refuse_untrained(config.model.class_path)
        if command == "predict" and isinstance(plain.get("data"), dict):
            check_predict_options(plain["data"].get("class_path", ""), plain["data"].get("init_args") or {})
        config.trainer.logger = self._loggers(config.trainer.logger)
        self.save_config_kwargs = {"config_filename": f"config_{command}.yaml", "overwrite": True}

    def _loggers(self, given: Any) -> Any:
        """Prepend a CSVLogger, which sets the run folder, unless a CSVLogger is given or loggers are disabled."""
        if given is False:
            return given
        others = [] if given is None or given is True else given if isinstance(given, list) else [given]
        for logger in others:
            _check_package(logger)
        if any(_is_csv(logger) for logger in others):
            return given
        arguments = Namespace(save_dir=str(self.runs.parent), name=self.runs.name, version=None, prefix="", flush_logs_every_n_steps=10)
        own = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=arguments)
        return [own, *others] if others else own

    def _refuse_untrained(self, class_path: str) -> None:
        if getattr(resolve_name(class_path), "trains", True):
            raise MisconfigurationException(
                f"`{self.subcommand}` would use {class_path.rpartition('.')[2]} with its initial weights; "
                f"add --ckpt_path (a file, or `last` or `best` for the latest run in {self.runs}), or --allow_untrained to use the initial weights"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer, and add a progress bar, a summary and checkpoint callbacks unless they are given or disabled."""
        config = self.config_init[str(self.subcommand)]
        given = config.trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            # The default of Lightning 2.6, a rich progress bar, fails if another progress bar is shown at the same time.
            callbacks.append(LossProgressBar() if sys.stdout.isatty() else LineProgress())
        if config.trainer.enable_model_summary is not False and not any(isinstance(callback, ModelSummary) for callback in callbacks):
            callbacks.append(ModelSummary())  # the default of Lightning is a rich summary
        if config.trainer.enable_checkpointing is not False and not any(isinstance(callback, Checkpoint) for callback in callbacks):
            callbacks += self._checkpoints(config.checkpoint)
        if self.subcommand == "predict" and not any(isinstance(callback, (BasePredictionWriter, PredictionWriter)) for callback in callbacks):
            callbacks += _prediction_writer(config.model)
        trainer = super().instantiate_trainer(callbacks=[RunFolder(), *callbacks], **kwargs)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.command = command_line(self._argv)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _checkpoints(self, checkpoint: ModelCheckpoint) -> list[ModelCheckpoint]:
        """Return the callback of the ``checkpoint`` section, and one that saves each epoch as the last one.

        ``checkpoint.every_n_epochs`` applies to the first callback only, so that a killed run loses at most one epoch.
        """
        if not checkpoint.save_last or checkpoint._every_n_train_steps or checkpoint._train_time_interval:
            return [checkpoint]
        checkpoint.save_last = None
        return [checkpoint, LastCheckpoint(checkpoint.dirpath)]

    def before_fit(self) -> None:
        """Check that the length of the run is limited.

        Raises:
            MisconfigurationException: If neither a limit is set nor a callback ends the run.
        """
        trainer: Any = self.trainer
        if trainer.max_epochs == trainer.max_steps == -1 and not any(
            isinstance(each, (SelfPlayLoop, Timer, EarlyStopping)) for each in trainer.callbacks
        ):
            raise MisconfigurationException(
                "the length of this run is not limited: max_epochs is -1, which needs the callback SelfPlayLoop; keep the callbacks of the recipe, "
                "or set --trainer.max_epochs, --trainer.max_steps or --trainer.max_time"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with claimed_folders(self.trainer):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            if interrupting_signal(error) is not None:
                self._end_processes()
                report(error, self._argv, self._last_checkpoint())
            raise

    def _end_processes(self) -> None:
        """End the other processes of this machine that Lightning has started, which would wait for this one."""
        if (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)

    def _last_checkpoint(self) -> str:
        """Return the path of the checkpoint of this run with the most steps; empty if there is none."""
        saved = [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each._last_checkpoint_saved]
        latest = max(saved, key=lambda each: (each._last_global_step_saved, isinstance(each, LastCheckpoint)), default=None)
        return latest._last_checkpoint_saved if latest else ""

    def after_fit(self) -> None:
        """Test the best checkpoint of the run, or the edited one, if ``test_after_fit`` is set."""
        if not self.config.fit.test_after_fit or self.trainer.interrupted:
            return
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
        if path and getattr(self.trainer.strategy, "zero_stage_3", False):
            # DeepSpeed cannot load a stage-3 checkpoint without the optimizer.
            log.info("ZeRO stage 3: testing the weights in memory, not %s", path)
            path = ""
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path or None)


def _prepare_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments for the parser: with ``--replace`` and ``--callback``, which jsonargparse does not have."""
    others, callbacks = split_callback_options(argv)
    return [*mark_replacements(others), *callbacks]


def _loadable_checkpoint(ckpt_path: str, strategy: Namespace | str) -> str:
    """Return a checkpoint that ``strategy`` can load: a DeepSpeed folder for ZeRO stages 1 and 2, otherwise a single file."""
    stage = strategy.get("init_args.stage") if isinstance(strategy, Namespace) else None
    if stage == 3 and isinstance(strategy, Namespace):
        strategy.init_args.load_full_weights = True
    return consolidate(ckpt_path) if Path(ckpt_path).is_dir() and stage not in (1, 2) else ckpt_path


def _prediction_writer(model: LightningModule) -> list[PredictionWriter]:
    """Return a list with the writer of predictions; an empty list, with a warning, if the model does not describe its predictions."""
    if hasattr(model, "recommend") or isinstance(model, DescribesPredictions):
        return [PredictionWriter()]
    log.warning(
        "predictions of %s are not written: it has neither `recommend` nor `describe`; add a callback that writes them "
        "(lightning.pytorch.callbacks.BasePredictionWriter)", type(model).__name__,
    )  # fmt: skip
    return []


def run(argv: Sequence[str]) -> MalleableCLI:
    """Run a command.

    Args:
        argv: Command and options.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for classes in the user's own files
    for name in dir(malleable):
        getattr(malleable, name)  # jsonargparse finds classes by name only if they are imported
    parser_kwargs: dict[str, Any] = {"prog": "malleable", "description": "Train, measure and use models."}
    for command in MalleableCLI.subcommands():
        # The default usage lists all options, and each error message would begin with it.
        usage = f"malleable {command} --config RECIPE [options]"
        parser_kwargs[command] = {"usage": usage, "default_config_files": [str(FOLDER / "base" / "fit.yaml")]}
    atexit.register(_leave_process_group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")  # Lightning 2.6 with torch 2.13
        warnings.filterwarnings("ignore", "The dirpath has changed")  # expected: each command has its own run folder
        cli = MalleableCLI(auto_configure_optimizers=False, parser_class=OptionParser, parser_kwargs=parser_kwargs, args=list(argv))
    if cli.trainer.log_dir and Path(cli.trainer.log_dir).is_dir():
        log.info("run folder: %s", cli.trainer.log_dir)
    return cli


def _check_package(logger: Any) -> None:
    """Check that the package of a logger is installed; jsonargparse would report the error of each alternative type.

    Raises:
        MisconfigurationException: If it is not installed.
    """
    name = str(logger.get("class_path") if isinstance(logger, Namespace) else "").rpartition(".")[2]
    packages = LOGGER_PACKAGES.get(name, ())
    if packages and not any(find_spec(package) for package in packages):
        raise MisconfigurationException(f"{name} needs the package {packages[0]}, which is not installed: pip install {packages[0]}")


def _is_csv(logger: Any) -> bool:
    class_path = logger.get("class_path") if isinstance(logger, Namespace) else None
    return class_path is not None and issubclass(resolve_name(class_path), CSVLogger)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _leave_process_group() -> None:
    """Destroy the process group. Otherwise, the threads of gloo could abort the process at exit, and a launcher would report a failed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
