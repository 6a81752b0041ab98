"""Help pages of the program and of the training commands, without torch and Lightning."""

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
  malleable fit --config sprec/tiny.yaml                          run a recipe: a local file, or a packaged recipe
  malleable fit --config sprec/tiny.yaml --data.batch_size 8      change a value of the recipe
  malleable fit --config sprec/tiny.yaml --config base/ddp.yaml   override the recipe by a second file
  malleable test --config sprec/tiny.yaml --ckpt_path last        test the latest run of the recipe
  malleable compare sprec/tiny sft/tiny                           compare the latest fits of two recipes, or two run folders
  malleable patch apply edits/paris model.ckpt                    apply a patch; `malleable patch revert` restores the weights
  malleable fit --help                                            show the options of a command
  malleable fit --model.help SPRec                                show the options of a class

Set MALLEABLE_DEBUG=1 to see the traceback of an error.
"""

# Public classes by option; tests/cli/test_help_pages.py compares the lists with the package.
MODELS = {
    "SPRec": "alternating supervised and preference phases; needs the callback SelfPlayLoop",
    "SFT": "supervised fine-tuning on the next title, or on packed histories",
    "DPO": "preference optimisation against a reference model; many losses",
    "AlphaDPO": "preference optimisation with an adaptive margin",
    "CausalLM": "causal language model on text",
    "SequentialRecommender": "SASRec, GRU4Rec, BERT4Rec or HSTU on sequences of items",
    "NFE": "knowledge-graph embedding by normalizing flows",
    "ComplEx": "point embedding of a knowledge graph",
    "DistMult": "point embedding of a knowledge graph",
    "RotatE": "point embedding of a knowledge graph",
    "TransE": "point embedding of a knowledge graph",
    "Markov": "baseline: counts of next items",
    "EASE": "baseline: linear model of items, in closed form",
    "ItemKNN": "baseline: nearest items by co-occurrence",
    "Popularity": "baseline: the most popular items",
}
DATA = {
    "RecommendationDataModule": "user histories and item titles",
    "KnowledgeGraphDataModule": "triples of a knowledge graph",
    "PreferenceDataModule": "prompts with chosen and rejected answers",
    "EditingDataModule": "texts, and requests to edit facts",
}
CALLBACKS = {
    "SelfPlayLoop": "alternates the phases of SPRec",
    "ReferenceCache": "computes the reference log-probabilities of DPO once",
    "AnswerSamples": "samples answers to held-out prompts, and measures the divergence from the reference",
    "AlphaEdit": "edits facts after training",
    "EditEvaluation": "measures a model before and after edits",
    "RunReport": "writes the report of a run",
    "Baselines": "adds baselines to the report: counts, or a SequentialRecommender",
    "ExposureReport": "adds the numbers of recommendations of items to the report",
    "EmbeddingReport": "exports and analyses the embeddings of a knowledge graph",
    "PredictionWriter": "writes predictions with your ids",
    "VectorWriter": "writes the vectors of users and items",
    "LastCheckpoint": "saves the last epoch",
    "LineProgress": "prints the progress as lines",
    "LossProgressBar": "shows a progress bar with the training loss",
}

_SUMMARIES = {
    "fit": "Train a model.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Predict with a checkpoint, and write the predictions to the run folder.",
}
_OPTIONS = {
    "--config NAME": "a recipe, or your own YAML file; later files override earlier ones",
    "--ckpt_path PATH": "a checkpoint file, or `last` or `best` for the latest run; `fit` resumes from it",
    "--seed_everything N": "the random seed (default: 42)",
    "--test_after_fit": "test the best checkpoint after `fit`",
    "--allow_untrained": "allow a model without a checkpoint",
    "--extend_catalog": "add items that the checkpoint does not have",
    "--print_config": "print the complete configuration, and exit",
}
_EXAMPLES = {
    "--trainer.max_epochs 5": "an option of Lightning's Trainer",
    "--model.tuning.lr 1e-4": "an option of the model",
    "--data.batch_size 16": "an option of the data module",
    "--data.source.path FILE": "an option of a nested class, here the source of the data module",
    "--trainer.callbacks.SelfPlayLoop.rounds 3": "an option of a callback of the recipe, by class name",
    "--checkpoint.monitor val_loss": "an option of Lightning's ModelCheckpoint",
}


def command_help(command: str) -> str:
    """Return the help page of ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        command: Name of the command.
    """
    parts = (
        f"usage: malleable {command} --config NAME [options]\n\n{_SUMMARIES[command]}",
        _table("options:", _OPTIONS),
        _table("change a value of the recipe (examples):", _EXAMPLES),
        _table("models (--model CLASS, or the import path of your own LightningModule):", MODELS),
        _table("data (--data CLASS, or the import path of your own LightningDataModule):", DATA),
        _table("callbacks (--trainer.callbacks+ CLASS):", CALLBACKS),
        _table(
            "more help (imports PyTorch, which takes some seconds):",
            {
                f"malleable {command} --model.help NFE": "all options of a model",
                f"malleable {command} --data.help EditingDataModule": "all options of a data module",
                f"malleable {command} --trainer.callbacks.help AlphaEdit": "all options of a callback",
                f"malleable {command} --config RECIPE --data.split.help": "all options of a nested class of a recipe",
                f"malleable {command} --help all": "all options of all sections",
            },
        ),
    )
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])
