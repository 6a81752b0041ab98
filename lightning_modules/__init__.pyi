"""The public modules: one line each, read by type checkers and by the lazy import alike."""

from malleable.lightning_modules.base import BaseModule as BaseModule
from malleable.lightning_modules.baselines import ItemKNN as ItemKNN
from malleable.lightning_modules.baselines import Markov as Markov
from malleable.lightning_modules.baselines import Popularity as Popularity
from malleable.lightning_modules.dpo import DPO as DPO
from malleable.lightning_modules.knowledge_graph import EmbeddingTuning as EmbeddingTuning
from malleable.lightning_modules.knowledge_graph import Init as Init
from malleable.lightning_modules.knowledge_graph import LinkRanking as LinkRanking
from malleable.lightning_modules.language_model import Decoding as Decoding
from malleable.lightning_modules.language_model import Tuning as Tuning
from malleable.lightning_modules.nfe import NFE as NFE
from malleable.lightning_modules.nfe import Flow as Flow
from malleable.lightning_modules.patches.containers import open_container as open_container
from malleable.lightning_modules.patches.delta import Delta as Delta
from malleable.lightning_modules.patches.patch import Patch as Patch
from malleable.lightning_modules.patches.stack import PatchStack as PatchStack
from malleable.lightning_modules.play import Play as Play
from malleable.lightning_modules.point_embeddings import ComplEx as ComplEx
from malleable.lightning_modules.point_embeddings import DistMult as DistMult
from malleable.lightning_modules.point_embeddings import RotatE as RotatE
from malleable.lightning_modules.point_embeddings import TransE as TransE
from malleable.lightning_modules.pretrained import LanguageModelConfig as LanguageModelConfig
from malleable.lightning_modules.pretrained import LoRA as LoRA
from malleable.lightning_modules.pretrained import Scratch as Scratch
from malleable.lightning_modules.sft import SFT as SFT
from malleable.lightning_modules.sprec import SPRec as SPRec
