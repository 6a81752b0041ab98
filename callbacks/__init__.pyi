"""The public callbacks: one line each, read by type checkers and by the lazy import alike."""

from malleable.callbacks.editing.alpha_edit import AlphaEdit as AlphaEdit
from malleable.callbacks.editing.post_fit import PostFitEdit as PostFitEdit
from malleable.callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
from malleable.callbacks.line_progress import LineProgress as LineProgress
from malleable.callbacks.predictions import PredictionWriter as PredictionWriter
from malleable.callbacks.reference import ReferenceCache as ReferenceCache
from malleable.callbacks.report.embeddings import EmbeddingReport as EmbeddingReport
from malleable.callbacks.report.exposure import ExposureReport as ExposureReport
from malleable.callbacks.report.floors import Floors as Floors
from malleable.callbacks.report.report import RunReport as RunReport
from malleable.callbacks.self_play.loop import SelfPlayLoop as SelfPlayLoop
from malleable.callbacks.self_play.phases import PhaseSettings as PhaseSettings
