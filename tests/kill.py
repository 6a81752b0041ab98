"""Kill runs with SIGKILL at random times, resume them, and compare the results with those of an uninterrupted run.

    python tests/kill.py [--kills 20] [--seed 0] [--parts self_play nfe sequential editing patches cache report predict]

Each part is a small job. If its folder contains files of an interrupted run, the job continues this run. The job runs once to its end. Then it is run
``--kills`` times in an empty folder, killed after a random share of its time, and resumed. Weights, metrics and files must be equal to those of the
uninterrupted run, and no temporary file may remain. The program prints a line for each part, and exits with status 1 if there is a difference.

A job is a fork of this process, which has imported all modules and has not started a thread.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

import post_fit_run
import small_shop
import tiny_patch
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from self_play_run import make_loop, make_module
from small_facts import NEW
from tiny_data import TinyData
from torch.utils.data import DataLoader
from toy_graph import toy_graph
from toy_sequences import ToySequences, packed_row, training_rows

from malleable import (  # noqa: F401  (imported before the forks)
    GBCE,
    EmbeddingReport,
    EncoderSettings,
    LastCheckpoint,
    PredictionWriter,
    ReferenceCache,
    RunReport,
    SequentialRecommender,
    Uniform,
)
from malleable.callbacks.report.page import Section
from malleable.checkpoints import AtomicCheckpointIO
from malleable.datamodules.batch import Batch
from malleable.datamodules.files.run_folders import find_run_checkpoint
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import open_container
from malleable.runs import RunFolder, claimed_folders

State = dict[str, str]
SHARED = Path(tempfile.gettempdir()) / f"malleable-kill-{os.getpid()}"  # files that all jobs read


# Jobs. The argument is the folder of the job, which may contain files of a killed run.


def self_play(folder: Path) -> None:
    """Run the warm-up and one round of self-play, with a report and the export of the model."""
    loop = make_loop(rounds=1)
    fit_and_test(folder, make_module(), TinyData(), [loop], "val_loss", "min", max_epochs=-1)


def nfe(folder: Path) -> None:
    """Train embeddings of a graph with a monitored checkpoint, and write their export and a report."""
    module = NFE("nfe2", 8, 1.0, gamma_trainable=True, dropout=0.2, tuning=EmbeddingTuning(lr=0.02, lr_decay=0.8))
    data = toy_graph(folder / "graph", cache_dir=str(folder / "cache"), batch_size=4, global_batch_size=8, eval_batch_size=4)
    fit_and_test(folder, module, data, [EmbeddingReport()], "val_mrr", "max", max_epochs=5, check_val_every_n_epoch=2)


def sequential(folder: Path) -> None:
    """Train a sequential recommender with sampled negatives and dropout on packed rows, with a monitored checkpoint."""
    encoder = EncoderSettings("sasrec", dim=8, num_layers=1, max_length=12, dropout=0.2)
    module = SequentialRecommender(encoder, loss=GBCE(), negatives=Uniform(4), ks=(1, 3))
    rows = [packed_row(training_rows(48)[start : start + 2]) for start in range(0, 48, 2)]
    data = ToySequences(train=rows, batch_size=2, global_batch_size=4)
    data.row_tokens = lambda: [len(row["items"]) - 2 for row in rows]
    fit_and_test(folder, module, data, [], "val_ndcg_3", "max", max_epochs=5)


def editing(folder: Path) -> None:
    """Train a model, and edit facts after training."""
    facts = [post_fit_run.make_request(fact) | {"true": "dog"} for fact in NEW[:3]]
    settings = EditSettings(**{**post_fit_run.SETTINGS, "targets": TargetSettings(lr=0.5, steps=10, clamp=4.0, decay=0.01), "batch_size": 2})
    callbacks = [post_fit_run.edit(requests=facts, settings=settings), post_fit_run.evaluation(texts=4, writing=0, generated="off")]
    module = post_fit_run.FactModule()
    module.load_state_dict(torch.load(SHARED / "learnt.pt", weights_only=True))
    fit_and_test(folder, module, None, callbacks, "val_known", "max", max_epochs=2, limit_val_batches=1, limit_test_batches=1)


def patches(folder: Path) -> None:
    """Apply and revert patches of a checkpoint and of a model folder alternately. At the end, both contain all patches."""
    for name in ("model.ckpt", "model"):
        if not (folder / name).exists():
            source = SHARED / "patched" / name
            temporary = folder / f"{name}.copy"
            shutil.rmtree(temporary, ignore_errors=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, temporary)
            temporary.rename(folder / name)
        edits = [Patch.read(path) for path in sorted((SHARED / "edits").iterdir())]
        for _ in range(4):
            for edit in edits:
                target = open_container(folder / name)
                assert set(target.stack.ids) <= {edit.id for edit in edits}
                if edit.id not in target.stack.ids:
                    tiny_patch.apply(folder / name, edit)
            tiny_patch.revert(folder / name)
        for edit in edits:
            tiny_patch.apply(folder / name, edit)


def cache(folder: Path) -> None:
    """Write the caches of a recommendation dataset, with its tokenizer, and of a graph."""
    os.environ["MALLEABLE_CACHE"] = str(folder / "cache")
    data = small_shop.shop(folder / "shop")
    graph = toy_graph(folder / "graph", cache_dir=str(folder / "cache"))
    for module in (data, graph):
        module.prepare_data()
        module.setup("fit")
    rows = [data.train_dataset[index] for index in range(len(data.train_dataset))]
    content = [data.catalog.titles, data.catalog.token_ids, rows, graph.graph.entities, graph.graph.frequency]
    (folder / "content").write_text(repr(content))


def report(folder: Path) -> None:
    """Write a report with figures several times."""
    page = RunReport(str(folder / "report"))
    page.folder = folder / "report"
    page.history = {f"train_{name}": [(step, step**0.5) for step in range(50)] for name in ("loss", "rate")}
    page.metrics = {"test_hr_10": 0.5}
    section = Section("More", figure=lambda figure: figure.subplots().plot([1, 2, 3]))
    for _ in range(3):
        page.write("Title", "Model", sections=[section])


class Numbers(LightningModule):
    """Module whose predictions are named columns."""

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {"label": [f"row {number}" for number in batch.sample_id.tolist()], "score": batch.sample_id / 7}


def predict(folder: Path) -> None:
    """Write predictions in all formats, for rows that are not in the order of their ids."""
    rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(rows, batch_size=100, collate_fn=lambda ids: Batch(torch.stack(ids)))
    writer = PredictionWriter(formats=("csv", "jsonl", "parquet"))
    logger = CSVLogger(folder, name="runs")
    trainer = Trainer(accelerator="cpu", devices=1, logger=logger, callbacks=[RunFolder(), writer], enable_progress_bar=False)
    with claimed_folders(trainer):
        trainer.predict(Numbers(), loader, return_predictions=False)


def fit_and_test(folder, module, data, callbacks, monitor, mode, **options) -> None:
    """Train and test as ``malleable fit`` does. A killed run continues from its last checkpoint."""
    seed_everything(7)
    checkpoints = [ModelCheckpoint(monitor=monitor, mode=mode, save_on_train_epoch_end=True), LastCheckpoint()]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name="runs"),
        callbacks=[RunFolder(), RunReport(), *callbacks, *checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=folder,
        **options,
    )
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    try:
        start = find_run_checkpoint("last", folder / "runs")
    except FileNotFoundError:
        start = None  # killed before its first checkpoint
    with claimed_folders(trainer):
        trainer.fit(module, data, ckpt_path=start)
        trainer.test(module, data, verbose=False, ckpt_path=trainer.checkpoint_callback.best_model_path)
    run = Path(trainer.log_dir)
    save_file({name: value.clone().contiguous() for name, value in module.state_dict().items()}, run / "weights.safetensors")


# Comparison


def state_of(folder: Path) -> State:
    """Return a digest of each file that a job has written, and the logged values, by name.

    Checkpoints and files of self-play are not compared: checkpoints contain paths of the run folder, and a resumed run has only the files that were
    written after the interruption. The weights, the tested checkpoint and the logged values, which depend on them, are compared.
    """
    runs = sorted((folder / "runs").glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))
    root = runs[-1] if runs else folder
    state = logged(runs)
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not re.search(r"^(metrics\.csv|hparams\.yaml|checkpoints/|graph/|shop/|cache/|self_play/)", name):
            state[name] = digest_of(path)
    for path in sorted((folder / "cache").glob("*/*")):
        state[f"cache/{path.parent.name}"] = "whole"
    return state


def logged(runs: list[Path]) -> State:
    """Return the logged values by step and name. A resumed run logs the steps after its checkpoint again, and its values replace the earlier ones."""
    values = {}
    for path in (run / "metrics.csv" for run in runs):
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    values |= {f"{name} at step {row['step']}": value for name, value in row.items() if value}
    return values


def digest_of(path: Path) -> str:
    """Return a digest of the content of a file, without times and paths."""
    if path.name.endswith(".md"):
        text = re.sub(r"\| (training time|tested checkpoint) \|.*", "", path.read_text())
        return hashlib.sha256(text.encode()).hexdigest()
    if path.name == "patch.json":
        return json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "created"}, sort_keys=True)
    if path.name == "metrics.json":
        return json.dumps(json.loads(path.read_text()), sort_keys=True)
    if path.suffix == ".safetensors":
        digest = hashlib.sha256()
        for name, value in sorted(load_file(path).items()):
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr((name, value)).encode())
        return digest.hexdigest()
    if path.suffix == ".ckpt":
        target = open_container(path)
        digest = hashlib.sha256(str(target.stack.ids).encode())
        for name in target.tensors:
            digest.update(target.tensors[name].numpy().tobytes())
        return digest.hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    return [name for name in found if name.endswith((".tmp", ".link"))]


# Processes


@contextlib.contextmanager
def started(job: Callable[[Path], None], folder: Path) -> Iterator[int]:
    """Start a job in a fork of this process, and yield its process id. The output of the job is written to ``<folder>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        output = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            os.environ["MALLEABLE_CACHE"] = str(folder.parent / "shared_cache")
            job(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    yield child


def finish(job: Callable[[Path], None], folder: Path) -> float:
    """Run a job to its end and return its seconds.

    Raises:
        RuntimeError: If the job fails. The message contains the end of its output.
    """
    begin = time.monotonic()
    with started(job, folder) as child:
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the job in {folder.name} ended with status {status}; its output is:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - begin


def killed(job: Callable[[Path], None], folder: Path, seconds: float) -> bool:
    """Start a job and kill it after the given seconds; return ``False`` if it ended earlier."""
    with started(job, folder) as child:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def prepare(parts: list[str]) -> None:
    """Write the shared files of the given parts: a model that has learnt facts, models to patch, and patches."""

    def learn(folder: Path) -> None:
        module = post_fit_run.FactModule()
        module.learn()
        torch.save(module.state_dict(), folder / "learnt.pt")

    def make_patches(folder: Path) -> None:
        tiny_patch.llama().save_pretrained(folder / "patched" / "model", max_shard_size="12KB")
        tiny_patch.save_checkpoint(tiny_patch.llama(), folder / "patched" / "model.ckpt")
        tensors = open_container(folder / "patched" / "model").tensors
        tiny_patch.random_patch(tensors, (tiny_patch.DOWN, tiny_patch.UP), title="one").write(folder / "edits" / "1")
        tiny_patch.random_patch(tensors, (tiny_patch.QUERY,), seed=1, title="two").write(folder / "edits" / "2")

    for part, job in (("editing", learn), ("patches", make_patches)):
        if part in parts:
            finish(job, SHARED)


def try_part(job: Callable[[Path], None], root: Path, kills: int, draws: random.Random) -> list[str]:
    """Kill and resume a job ``kills`` times, and return the differences from an uninterrupted run as texts."""
    seconds = finish(job, root / "whole")
    expected = state_of(root / "whole")
    problems, done = [], 0
    while done < kills:
        folder = root / f"kill-{done}"
        after = draws.uniform(0, seconds)
        if not killed(job, folder, after):
            shutil.rmtree(folder)
            seconds *= 0.95  # the job was faster than the first run
            continue
        done += 1
        try:
            finish(job, folder)
        except RuntimeError as error:
            problems.append(f"killed after {after:.2f} s: {error}")
            continue
        found = state_of(folder)
        changed = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
        problems += [
            f"killed after {after:.2f} s: {name} is {str(found.get(name))[:500]}, expected {str(expected.get(name))[:500]}" for name in changed
        ]
        problems += [f"killed after {after:.2f} s: the temporary file {name} remains" for name in leftovers(folder)]
        if not changed:
            shutil.rmtree(folder)
    return problems


JOBS = {job.__name__: job for job in (self_play, nfe, sequential, editing, patches, cache, report, predict)}


def main(arguments: list[str]) -> int:
    """Run the given parts, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills of each part")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--parts", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--folder", type=Path, help="working folder; default: a temporary folder, which is kept if there are differences")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root = options.folder or Path(tempfile.mkdtemp(prefix="malleable-kill-"))
    wrong = 0
    prepare(options.parts)
    for name in options.parts:
        begin = time.monotonic()
        problems = try_part(JOBS[name], root / name, options.kills, random.Random(f"{options.seed} {name}"))
        wrong += len(problems)
        sys.stdout.write(f"{name}: {options.kills} kills, {len(problems)} problems, {time.monotonic() - begin:.0f} s\n")
        sys.stdout.write("".join(f"  {problem}\n" for problem in problems))
        sys.stdout.flush()
    shutil.rmtree(SHARED, ignore_errors=True)
    SHARED.with_suffix(".log").unlink(missing_ok=True)
    if wrong == 0 and options.folder is None:
        shutil.rmtree(root)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
