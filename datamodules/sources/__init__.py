"""Sources of recommendation data, of knowledge graphs, of facts and of texts: one file per public source or format."""

from malleable.datamodules.sources.base import InteractionTables, ReadyRow, ReadyRows, Source
from malleable.datamodules.sources.candidates import CandidateRows
from malleable.datamodules.sources.codex import CoDExS
from malleable.datamodules.sources.countries import Countries
from malleable.datamodules.sources.edit_records import CounterFact, FlatCounterFact, QAEdit, RequestFile, ZsRE
from malleable.datamodules.sources.edits import EditSource, EditTables
from malleable.datamodules.sources.fact_files import LRE, ParaRel
from malleable.datamodules.sources.facts import FactSource, FactTables
from malleable.datamodules.sources.fb15k237 import FB15k237
from malleable.datamodules.sources.graph import GraphSource, GraphTables
from malleable.datamodules.sources.instruction import InstructionRows
from malleable.datamodules.sources.movielens import MovieLens
from malleable.datamodules.sources.small_graphs import UMLS, Kinship, Nations
from malleable.datamodules.sources.synthetic import Synthetic
from malleable.datamodules.sources.synthetic_graph import SyntheticGraph
from malleable.datamodules.sources.tables import Tables
from malleable.datamodules.sources.texts import TextFile, TextSource, WordNetGlosses
from malleable.datamodules.sources.triples import Triples
from malleable.datamodules.sources.wn18rr import WN18RR
from malleable.datamodules.sources.yago310 import YAGO310

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
