"""The public data modules and batches: one line each, read by type checkers and by the lazy import alike."""

from malleable.datamodules.base import BaseDataModule as BaseDataModule
from malleable.datamodules.batch import AnswerBatch as AnswerBatch
from malleable.datamodules.batch import Batch as Batch
from malleable.datamodules.batch import Catalog as Catalog
from malleable.datamodules.batch import KnowledgeGraph as KnowledgeGraph
from malleable.datamodules.batch import PackedBatch as PackedBatch
from malleable.datamodules.batch import PreferenceBatch as PreferenceBatch
from malleable.datamodules.batch import QueryBatch as QueryBatch
from malleable.datamodules.batch import Recommendations as Recommendations
from malleable.datamodules.batch import Vocabulary as Vocabulary
from malleable.datamodules.batch import collate as collate
from malleable.datamodules.editing.datamodule import EditingDataModule as EditingDataModule
from malleable.datamodules.editing.requests import EditRequest as EditRequest
from malleable.datamodules.editing.requests import Probe as Probe
from malleable.datamodules.editing.requests import read_requests as read_requests
from malleable.datamodules.graphs.datamodule import KnowledgeGraphDataModule as KnowledgeGraphDataModule
from malleable.datamodules.loading import PhasedLoader as PhasedLoader
from malleable.datamodules.negatives import Hardest as Hardest
from malleable.datamodules.negatives import Mixture as Mixture
from malleable.datamodules.negatives import NegativeSampler as NegativeSampler
from malleable.datamodules.negatives import SelfPlay as SelfPlay
from malleable.datamodules.negatives import Semantic as Semantic
from malleable.datamodules.negatives import Uniform as Uniform
from malleable.datamodules.recommendation.datamodule import RecommendationDataModule as RecommendationDataModule
from malleable.datamodules.recommendation.prompt import PromptTemplate as PromptTemplate
from malleable.datamodules.recommendation.splits import Split as Split
