"""Layer patterns of NVIDIA's Mamba-2-Hybrid (arXiv 2406.07887), such as "M-M*-", as blocks of `zoo_hybrid`.

There, attention, Mamba-2 and MLP are layers of their own, each with its norm and residual; here, a token mixer and the
MLP after it are the two halves of one block. The blocks are the same computation. Only the order of layers is read:
keys of Megatron's checkpoints are not converted, and that model's MLP is another one than the gated one.
"""

_MIXERS = {"M": "mamba2", "*": "full_attention"}
_MLP = "-"


def blocks_of_pattern(pattern: str) -> tuple[list[str], list[str]]:
    """Read a pattern.

    Args:
        pattern: one letter a layer: `M` Mamba-2, `*` attention, `-` MLP.

    Returns:
        `mixer_types` and `mlp_types` of a ZooHybridConfig, one entry a block.

    Raises:
        ValueError: if the pattern is empty or has another letter, with its place.
    """
    mixers: list[str] = []
    mlps: list[str] = []
    for place, letter in enumerate(pattern):
        if letter in _MIXERS:
            mixers.append(_MIXERS[letter])
            mlps.append("none")
        elif letter != _MLP:
            raise ValueError(f"pattern: got {letter!r} at place {place} of {pattern!r}; accepted: M, * and -")
        elif mlps and mlps[-1] == "none":
            mlps[-1] = "gated"
        else:
            mixers.append("none")
            mlps.append("gated")
    if not mixers:
        raise ValueError("pattern: it is empty; accepted: one of M, * and - for each layer")
    return mixers, mlps
