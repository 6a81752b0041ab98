"""Helpers of the knowledge-graph benchmarks: graphs by name, PyKEEN models with our weights, and alternating measurement of both programs (sides)."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import logging
import statistics
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from devices import add_device_arguments, describe, synchronize
from pykeen.models import ComplEx as TheirComplEx
from pykeen.models import DistMult as TheirDistMult
from pykeen.models import ERModel
from pykeen.models import TransE as TheirTransE
from pykeen.triples import CoreTriplesFactory
from torch import Tensor

from malleable import NFE, ComplEx, DistMult, KnowledgeGraphDataModule, TransE
from malleable.datamodules.sources.graphs.published import UMLS, WN18RR, CoDExS, FB15k237, Kinship, PublishedGraph
from malleable.lightning_modules.functional.graphs import one_vs_all
from malleable.lightning_modules.graphs.knowledge_graph import KnowledgeGraphModule
from malleable.lightning_modules.losses.embedding import EmbeddingLoss
from malleable.lightning_modules.metrics import link_prediction

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
literal_kg = importlib.import_module("literal_kg")

log = logging.getLogger("benchmark")

LR = 1e-3
GRAPHS: dict[str, Callable[..., PublishedGraph]] = {"codex_s": CoDExS, "wn18rr": WN18RR, "fb15k237": FB15k237, "umls": UMLS, "kinship": Kinship}
POINTS: dict[str, Callable[..., KnowledgeGraphModule]] = {"TransE": TransE, "DistMult": DistMult, "ComplEx": ComplEx}
FLOWS = {"NFE-1": ("nfe1", "NFE1"), "NFE-2": ("nfe2", "NFE2"), "NFE-3": ("nfe3", "NFE3")}
# Squared distances, no constraints and no regularisers, so that the models are equal to ours.
THEIRS: dict[str, tuple[Callable[..., ERModel], dict[str, Any]]] = {
    "TransE": (TheirTransE, {"scoring_fct_norm": 2, "power_norm": True, "entity_constrainer": None}),
    "DistMult": (TheirDistMult, {"entity_constrainer": None, "regularizer": None}),
    "ComplEx": (TheirComplEx, {"regularizer": None}),
}


class Case(NamedTuple):
    """Comparison of two programs (sides) that do the same work.

    Attributes:
        name: Name of the case, e.g. of the model.
        peer: Name of the other side.
        bar: Target ratio; ``None`` if the ratio is only reported.
        ours: Function that runs our side and returns the seconds of each repetition.
        theirs: Function that runs the other side and returns the seconds of each repetition.
        notes: Properties of the case, which are printed and written to the JSON file.
    """

    name: str
    peer: str
    bar: float | None
    ours: Callable[[], list[float]]
    theirs: Callable[[], list[float]]
    notes: Mapping[str, Any]


def parser_of(doc: str, name: str) -> ArgumentParser:
    """Return a parser with the options that all knowledge-graph benchmarks have."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=GRAPHS, default="codex_s")
    parser.add_argument("--path", help="folder with train.txt, valid.txt and test.txt; default: the files are downloaded")
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128, help="number of queries of a batch, for both sides")
    parser.add_argument("--models", nargs="+", choices=[*POINTS, *FLOWS], default=[*POINTS, *FLOWS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_device_arguments(parser, dtype=False)
    parser.add_argument("--precision", default="32-true", help="precision of our Trainer; the other side uses float32")
    parser.add_argument("--compared", type=int, help="number of scores that our ranking compares at a time; default: that of the device")
    parser.add_argument("--chunk", type=int, help="number of values in a chunk of our loss over all entities; default: that of the device")
    parser.add_argument("--json", type=Path, default=Path(f"{name}.json"))
    return parser


def begin(options: Namespace) -> None:
    """Set the number of threads and the chunk sizes, and configure the output."""
    torch.set_num_threads(options.threads)
    for sizes, size in ((link_prediction.COMPARED, options.compared), (one_vs_all.CHUNK, options.chunk)):
        if size is not None:
            sizes[options.device] = size
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    for name in ("pykeen", "lightning.pytorch", "malleable"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "pykeen"))
    log.info(
        "%s; %s, %s; on both sides: garbage collection %s, no worker processes", versions, describe(options.device), options.precision, _collection()
    )
    log.info(
        "%s: dimension %s, %s queries in a batch, medians of %s alternating repetitions",
        options.data,
        options.dimension,
        options.batch,
        options.repeats,
    )


def _collection() -> str:
    return "on" if gc.isenabled() else "off"


def now(device: str) -> float:
    """Wait until the device has finished, and return the time in seconds."""
    synchronize(device)
    return time.perf_counter()


def trainer_settings(options: Namespace) -> dict[str, Any]:
    """Return the arguments of our Trainer that depend on the options."""
    return {"accelerator": "gpu" if options.device == "cuda" else "cpu", "devices": 1, "precision": options.precision}


def opened(options: Namespace, group_queries: bool) -> KnowledgeGraphDataModule:
    """Return a data module with the graph, set up for training."""
    data = KnowledgeGraphDataModule(GRAPHS[options.data](path=options.path), group_queries=group_queries, batch_size=options.batch)
    data.prepare_data()
    data.setup("fit")
    return data


def our_model(name: str, data: KnowledgeGraphDataModule, dimension: int, loss: EmbeddingLoss | None = None) -> KnowledgeGraphModule:
    """Return one of our models. The default loss is that of NFE."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dimension": dimension, "graph": data.graph, "loss": loss, "tuning": {"lr": LR}}
    module = NFE(FLOWS[name][0], gamma=1.0, **settings) if name in FLOWS else POINTS[name](**settings)
    module.configure_model()
    return module


def their_model(name: str, factory: CoreTriplesFactory, dimension: int) -> ERModel:
    """Return one of PyKEEN's models with binary cross-entropy over all entities."""
    make, settings = THEIRS[name]
    return make(triples_factory=factory, embedding_dim=dimension, loss="bcewithlogits", random_seed=0, **settings)


@torch.no_grad()
def give_weights(module: KnowledgeGraphModule, theirs: ERModel, relation_order: Tensor) -> None:
    """Copy the weights of our tables to the PyKEEN model. Row ``i`` of its relations gets our row ``relation_order[i]``."""
    ours = module.tables[0].weight, module.tables[1].weight[relation_order]
    for table, representations in zip(ours, (theirs.entity_representations, theirs.relation_representations), strict=True):
        if module.interaction.complex_parts:
            # PyKEEN stores complex numbers as pairs (real, imaginary); we store all real parts first.
            table = torch.stack(table.chunk(2, 1), -1)
        representations[0]._embeddings.weight.copy_(table.reshape(len(table), -1))


def measure(cases: list[Case], options: Namespace) -> None:
    """Run all cases. The sides alternate, so that other load affects both. The last line is the smallest ratio of the cases with a target ratio."""
    results = []
    for case in cases:
        runs: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            runs["ours"] += case.ours()
            runs["theirs"] += case.theirs()
        ours, theirs = (statistics.median(runs[side]) for side in ("ours", "theirs"))
        ratio = theirs / ours
        verdict = "no target" if case.bar is None else f"target {case.bar:g}, {'reached' if ratio >= case.bar else 'not reached'}"
        notes = ", ".join(f"{key} {value}" for key, value in case.notes.items())
        log.info("%s: ours %.3f s, %s %.3f s, ratio %.2f (%s); %s", case.name, ours, case.peer, theirs, ratio, verdict, notes)
        results.append({"name": case.name, "peer": case.peer, "bar": case.bar, "ratio": ratio, "runs": runs, **case.notes})
    figures = {"options": {key: str(value) for key, value in vars(options).items()}, "torch": torch.__version__, "cases": results}
    options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    barred = [result for result in results if result["bar"] is not None] or results
    log.info("wrote the figures to %s\nratio: %.2f", options.json, min(result["ratio"] for result in barred))
