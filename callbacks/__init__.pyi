"""Public callbacks, read by type checkers and by ``lazy_loader``."""

from .answer_samples import AnswerSamples as AnswerSamples
from .editing.alpha_edit import AlphaEdit as AlphaEdit
from .editing.edit_evaluation import EditEvaluation as EditEvaluation
from .editing.post_fit import PostFitEdit as PostFitEdit
from .last_checkpoint import LastCheckpoint as LastCheckpoint
from .line_progress import LineProgress as LineProgress
from .line_progress import LossProgressBar as LossProgressBar
from .predictions import PredictionWriter as PredictionWriter
from .reference import ReferenceCache as ReferenceCache
from .report.baselines import Baselines as Baselines
from .report.embeddings import EmbeddingReport as EmbeddingReport
from .report.exposure import ExposureReport as ExposureReport
from .report.report import RunReport as RunReport
from .self_play.loop import SelfPlayLoop as SelfPlayLoop
from .self_play.phases import PhaseSettings as PhaseSettings
from .vectors import VectorWriter as VectorWriter
