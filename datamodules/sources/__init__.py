"""Sources of recommendation data, of knowledge graphs, of facts and of texts: one file per public source or format."""

from malleable.datamodules.sources.editing.base import EditSource, EditTables
from malleable.datamodules.sources.editing.countries import Countries
from malleable.datamodules.sources.editing.edit_records import CounterFact, FlatCounterFact, QAEdit, RequestFile, ZsRE
from malleable.datamodules.sources.editing.fact_files import LRE, ParaRel
from malleable.datamodules.sources.editing.facts import FactSource, FactTables
from malleable.datamodules.sources.editing.texts import TextFile, TextSource, WordNetGlosses
from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables
from malleable.datamodules.sources.graphs.codex import CoDExS
from malleable.datamodules.sources.graphs.fb15k237 import FB15k237
from malleable.datamodules.sources.graphs.small_graphs import UMLS, Kinship, Nations
from malleable.datamodules.sources.graphs.synthetic import SyntheticGraph
from malleable.datamodules.sources.graphs.triples import Triples
from malleable.datamodules.sources.graphs.wn18rr import WN18RR
from malleable.datamodules.sources.graphs.yago310 import YAGO310
from malleable.datamodules.sources.recommendation.base import InteractionTables, ReadyRow, ReadyRows, Source
from malleable.datamodules.sources.recommendation.candidates import CandidateRows
from malleable.datamodules.sources.recommendation.instruction import InstructionRows
from malleable.datamodules.sources.recommendation.movielens import MovieLens
from malleable.datamodules.sources.recommendation.synthetic import Synthetic
from malleable.datamodules.sources.recommendation.tables import Tables

__all__ = [
    "LRE",
    "UMLS",
    "WN18RR",
    "YAGO310",
    "CandidateRows",
    "CoDExS",
    "CounterFact",
    "Countries",
    "EditSource",
    "EditTables",
    "FB15k237",
    "FactSource",
    "FactTables",
    "FlatCounterFact",
    "GraphSource",
    "GraphTables",
    "InstructionRows",
    "InteractionTables",
    "Kinship",
    "MovieLens",
    "Nations",
    "ParaRel",
    "QAEdit",
    "ReadyRow",
    "ReadyRows",
    "RequestFile",
    "Source",
    "Synthetic",
    "SyntheticGraph",
    "Tables",
    "TextFile",
    "TextSource",
    "Triples",
    "WordNetGlosses",
    "ZsRE",
]
