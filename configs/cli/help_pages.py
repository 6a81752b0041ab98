"""Help of the program and of its training commands, without imports of torch or Lightning."""

from __future__ import annotations

HELP = """usage: malleable <command> [options]

commands:
  fit        train, then test if the recipe says `test_after_fit: true`
  validate   measure a checkpoint on the validation split
  test       measure a checkpoint on the test split
  predict    predict with a checkpoint
  recipes    list the packaged recipes; `recipes show NAME` prints one, `recipes copy NAME [FILE]` copies it
  compare    show the test metrics of several runs side by side, with paired intervals
  patch      list, show, compare, apply, revert and export patches of stored weights

examples:
  malleable fit --config sprec/tiny.yaml                          run a recipe: a file here, or one of the package
  malleable fit --config sprec/tiny.yaml --data.batch_size 8      change a value of it
  malleable fit --config sprec/tiny.yaml --config base/ddp.yaml   lay a second file over it
  malleable test --config sprec/tiny.yaml --ckpt_path last        measure its latest run
  malleable compare sprec/tiny sft/tiny                           compare the latest fits of two recipes, or run folders
  malleable patch apply edits/paris model.ckpt                    apply a patch; `malleable patch revert` brings the weights back
  malleable fit --help                                            see the options of a command
  malleable fit --model.help SPRec                                see the options of one class

Set MALLEABLE_DEBUG=1 to see the traceback of an error.
"""

# Public classes by the option that takes them; tests/cli/test_help_pages.py compares them with the classes themselves.
MODELS = {
    "SPRec": "supervised and preference phases in turn; needs the callback SelfPlayLoop",
    "SFT": "supervised tuning on the next title, or on whole packed histories",
    "DPO": "preference optimisation against a reference",
    "CausalLM": "a plain language model on text",
    "NFE": "knowledge-graph embedding by normalizing flows",
    "ComplEx": "point embedding of a knowledge graph",
    "DistMult": "point embedding of a knowledge graph",
    "RotatE": "point embedding of a knowledge graph",
    "TransE": "point embedding of a knowledge graph",
    "Markov": "next-item counts",
    "ItemKNN": "item neighbours by co-occurrence",
    "Popularity": "the most popular items",
}
DATA = {
    "RecommendationDataModule": "histories of users and titles of items",
    "KnowledgeGraphDataModule": "triples of a knowledge graph",
    "EditingDataModule": "texts, and requests to edit facts",
}
CALLBACKS = {
    "SelfPlayLoop": "alternates the phases of SPRec",
    "ReferenceCache": "computes the reference log-probabilities of DPO once",
    "AlphaEdit": "edits facts after training",
    "EditEvaluation": "measures edits, before and after",
    "RunReport": "writes the report of a run",
    "Baselines": "adds counting baselines to the report",
    "ExposureReport": "adds what is recommended how often to the report",
    "EmbeddingReport": "exports the tables of a knowledge graph and analyses them",
    "PredictionWriter": "writes predictions with your ids",
    "LastCheckpoint": "saves the last epoch",
    "LineProgress": "shows the progress in lines",
    "LossProgressBar": "shows the progress in a bar, with the training loss",
}

_DOES = {
    "fit": "Train a model.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Predict with a checkpoint, and write the answers into the run folder.",
}
_OPTIONS = {
    "--config NAME": "a recipe, or a YAML file of yours; later ones are laid over earlier ones",
    "--ckpt_path PATH": "a checkpoint file, or `last` or `best` of the latest run; `fit` resumes from it",
    "--seed_everything N": "the random seed (default: 42)",
    "--test_after_fit": "test the best checkpoint after `fit`",
    "--allow_untrained": "measure a model without a checkpoint",
    "--extend_catalog": "add items that the checkpoint does not have",
    "--print_config": "print everything that the command would run with, and exit",
}
_PLACES = {
    "--trainer.max_epochs 5": "an option of Lightning's Trainer",
    "--model.tuning.lr 1e-4": "an option of the model",
    "--data.batch_size 16": "an option of the data module",
    "--data.source.path FILE": "an option of a class within it",
    "--trainer.callbacks.SelfPlayLoop.rounds 3": "an option of a callback of the recipe, by its class",
    "--checkpoint.monitor val_loss": "an option of Lightning's ModelCheckpoint",
}


def command_help(command: str) -> str:
    """Return the help page of ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        command: The command.
    """
    values = (
        f"usage: malleable {command} --config NAME [options]\n\n{_DOES[command]}",
        _table("options:", _OPTIONS),
        _table("change a value of the recipe (examples):", _PLACES),
        _table("models (--model CLASS, or the import path of a LightningModule of yours):", MODELS),
        _table("data (--data CLASS, or the import path of a LightningDataModule of yours):", DATA),
        _table("callbacks (--trainer.callbacks+ CLASS):", CALLBACKS),
        _table(
            "more help (these import PyTorch, which takes some seconds):",
            {
                f"malleable {command} --model.help NFE": "all options of a model",
                f"malleable {command} --data.help EditingDataModule": "all options of a data module",
                f"malleable {command} --trainer.callbacks.help AlphaEdit": "all options of a callback",
                f"malleable {command} --config RECIPE --data.split.help": "all options of a class that a recipe uses",
                f"malleable {command} --help all": "all options of all sections",
            },
        ),
    )
    return "\n\n".join(values) + "\n"


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])
