"""The table of token mixers: every kind that a block of `zoo_hybrid` may have, by its name.

Each row is defined in the mixer's own file; `mixer.py` documents the fields. To add a mixer, write a file and add its
row here: an import line and an entry.
"""

from .attention import FULL_ATTENTION, SLIDING_ATTENTION
from .bounded_memory import BOUNDED_ATTENTION
from .discrete_mamba2 import DISCRETE_MAMBA2
from .linear_attention import LINEAR_ATTENTION
from .masked_mixing import MASKED_MIXING
from .mixer import TokenMixer
from .modeling_mamba import MAMBA
from .modeling_mamba2 import MAMBA2
from .retention import RETENTION
from .selective_attention import SELECTIVE_ATTENTION

TOKEN_MIXERS: dict[str, TokenMixer] = {
    "full_attention": FULL_ATTENTION,
    "sliding_attention": SLIDING_ATTENTION,
    "bounded_attention": BOUNDED_ATTENTION,
    "linear_attention": LINEAR_ATTENTION,
    "selective_attention": SELECTIVE_ATTENTION,
    "mamba": MAMBA,
    "discrete_mamba2": DISCRETE_MAMBA2,
    "mamba2": MAMBA2,
    "masked_mixing": MASKED_MIXING,
    "retention": RETENTION,
}
