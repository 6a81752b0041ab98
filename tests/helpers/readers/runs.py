"""Readers of the state of runs: caches, rounds, recipes, reports."""

import json

import pyarrow as pa
import torch

from readers.registry import reader


@reader("reference", "r.safetensors")
class _Reference:
    def make(folder):
        from malleable.lightning_modules.verified_file import save_verified

        save_verified({"row": torch.tensor([5, 3, 8]), "reference_logps": torch.zeros(3, 2)}, folder / "r.safetensors")

    def read(folder):
        from malleable.callbacks.reference import ReferenceCache

        return ReferenceCache._read(folder / "r.safetensors", torch.tensor([3, 8]))


@reader("second moments", "s.safetensors")
class _Statistics:
    def make(folder):
        from malleable.lightning_modules.editing.statistics import _write
        from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

        _write(folder / "s.safetensors", "hash", {1: SecondMoment(3), 2: SecondMoment(3)}, 2)

    def read(folder):
        from malleable.lightning_modules.editing.statistics import _load
        from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

        return _load(folder / "s.safetensors", "hash", {1: SecondMoment(3), 2: SecondMoment(3)})


@reader("round", "r.parquet")
class _Round:
    def make(folder):
        from malleable.callbacks.self_play.round_file import RoundFile

        RoundFile([0, 1], [5, 6], [[1], [2]], [[[3, 4]], [[5]]], [[0.5, 0.1], [0.2, 0.3]]).write(folder / "r.parquet")

    def read(folder):
        from malleable.callbacks.self_play.round_file import RoundFile

        return RoundFile.read(folder / "r.parquet").digest()


@reader("cache of tables", "t/manifest.json", "t/items/data-00000-of-00001.arrow", "t/items/state.json", "t/items/dataset_info.json")
class _TableCache:
    def make(folder):
        from malleable.datamodules.files.cache import write_tables

        write_tables(folder / "t", {"items": {"id": pa.array([1, 2, 3])}}, {"x": 1})

    def read(folder):
        from malleable.datamodules.files.cache import open_tables

        return open_tables(folder / "t")


@reader("cache of arrays", "a/manifest.json", "a/x.npy")
class _ArrayCache:
    def make(folder):
        import numpy as np

        from malleable.datamodules.files.cache import write_arrays

        write_arrays(folder / "a", {"x": np.arange(5)}, {"x": 1})

    def read(folder):
        from malleable.datamodules.files.cache import open_arrays

        return open_arrays(folder / "a")


RECIPE = """\
model:
  class_path: ComplEx
  init_args: {dimension: 8}
data:
  class_path: KnowledgeGraphDataModule
  init_args:
    source: {class_path: Nations}
trainer:
  max_epochs: 1
  callbacks:
  - class_path: RunReport
"""


@reader("configuration beside a checkpoint", "version_0/config_fit.yaml")
class _Beside:
    def make(folder):
        (folder / "version_0" / "checkpoints").mkdir(parents=True)
        torch.save({"state_dict": {}}, folder / "version_0" / "checkpoints" / "last.ckpt")
        (folder / "version_0" / "config_fit.yaml").write_text(RECIPE)

    def read(folder):
        from malleable.checkpoints import differences, stored_model
        from malleable.lightning_modules.stored_weights import foreign_classes

        stored = stored_model(str(folder / "version_0" / "checkpoints" / "last.ckpt"))
        return stored and (differences({}, stored), foreign_classes(stored["init_args"]))


@reader("recipe", "r.yaml", slow=2)
class _Recipe:
    def make(folder):
        (folder / "r.yaml").write_text(RECIPE)

    def read(folder):
        from malleable.argument_checks import check_arguments
        from malleable.layers import RecipeFile
        from malleable.option_errors import OptionParser

        check_arguments(["fit", "--config", str(folder / "r.yaml")])
        parser = OptionParser(prog="x")
        parser.add_argument("--config", action=RecipeFile)
        for key in ("model", "data", "trainer", "checkpoint"):
            parser.add_argument(f"--{key}", type=dict)
        return parser.parse_args(["--config", str(folder / "r.yaml")])


@reader("compared run", "a/report/metrics.json", "a/report/test_rows.safetensors", "a/config_fit.yaml")
class _Compared:
    def make(folder):
        from safetensors.torch import save_file

        from malleable.commands.reported_runs import CONDITIONS, INPUTS

        for name in "ab":
            report = folder / name / "report"
            report.mkdir(parents=True)
            (report / "metrics.json").write_text(json.dumps({"test_hr_10": 0.5, "test_ndcg_10": 0.25, "test_gini_10": None, "val_loss": 1.0}))
            rows = {"sample_id": torch.arange(4), "target": torch.arange(4), "rank": torch.tensor([1.0, 2.0, 4.0, float("inf")])}
            save_file(rows, report / "test_rows.safetensors", metadata={CONDITIONS: '{"titles": "x"}', INPUTS: "{}"})
            (report.parent / "config_fit.yaml").write_text(RECIPE)

    def read(folder):
        from malleable.commands.compare import compare, render
        from malleable.commands.reported_runs import load_run

        found = compare([load_run(str(folder / name)) for name in "ab"], every=True)
        return [render(found, style) for style in ("table", "markdown", "csv", "json")]
