"""The public callbacks: one line each, read by type checkers and by the lazy import alike."""

from malleable.callbacks.alpha_edit import AlphaEdit as AlphaEdit
from malleable.callbacks.embeddings import EmbeddingReport as EmbeddingReport
from malleable.callbacks.exposure import ExposureReport as ExposureReport
from malleable.callbacks.floors import Floors as Floors
from malleable.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
from malleable.callbacks.line_progress import LineProgress as LineProgress
from malleable.callbacks.phases import PhaseSettings as PhaseSettings
from malleable.callbacks.post_fit import PostFitEdit as PostFitEdit
from malleable.callbacks.predictions import PredictionWriter as PredictionWriter
from malleable.callbacks.reference import ReferenceCache as ReferenceCache
from malleable.callbacks.report import RunReport as RunReport
from malleable.callbacks.self_play import SelfPlayLoop as SelfPlayLoop
