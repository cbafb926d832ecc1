"""Models built from the operators of hierkernels, with data, training and sampling."""

from python_models.autoregressive_wrapper import AutoregressiveWrapper
from python_models.gmlp_gpt import gMLPGPT
from python_models.hierarchical_transformer import HierarchicalTransformer
from python_models.megabyte import MEGABYTE
from python_models.memformer import Memformer
from python_models.memformer_language_model import MemformerLanguageModel
from python_models.memory_replay import memory_replay_backprop
from python_models.nsa_attention import SparseAttention
from python_models.nsa_transformer import Transformer as NSATransformer

__all__ = [
    "MEGABYTE",
    "AutoregressiveWrapper",
    "HierarchicalTransformer",
    "Memformer",
    "MemformerLanguageModel",
    "NSATransformer",
    "SparseAttention",
    "gMLPGPT",
    "memory_replay_backprop",
]
