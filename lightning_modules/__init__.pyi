"""The public modules: one line each, read by type checkers and by the lazy import alike."""

from malleable.lightning_modules.base import BaseModule as BaseModule
from malleable.lightning_modules.baselines import ItemKNN as ItemKNN
from malleable.lightning_modules.baselines import Markov as Markov
from malleable.lightning_modules.baselines import Popularity as Popularity
from malleable.lightning_modules.dpo import DPO as DPO
from malleable.lightning_modules.language_model import Decoding as Decoding
from malleable.lightning_modules.language_model import Tuning as Tuning
from malleable.lightning_modules.play import Play as Play
from malleable.lightning_modules.pretrained import LanguageModelConfig as LanguageModelConfig
from malleable.lightning_modules.pretrained import LoRA as LoRA
from malleable.lightning_modules.pretrained import Scratch as Scratch
from malleable.lightning_modules.sft import SFT as SFT
from malleable.lightning_modules.sprec import SPRec as SPRec
