"""The comparison of a distillation report, with numbers made up by formulas: every cell has its own."""

from itertools import pairwise
from typing import Any

# Name, kind, and how far from the teacher: 0 is the teacher itself.
_MODELS = (("teacher", "teacher", 0.0), ("window + sinks", "control", 1.0), ("distil", "stage", 0.25))
_BINS = (0, 128, 256, 512, 1024, 2048)
_CONTEXTS = (2048, 8192, 32768)


def example_comparison() -> dict[str, Any]:
    """Teacher, control and student of `example_report`; a fresh dict at every call."""
    return {
        "models": [_model(*values) for values in _MODELS],
        "seconds": {"by_position": 20.5, "repeat": 10.25, "recall": 30.0, "choice": 15.0, "decoding": 25.25},
    }


def _model(name: str, kind: str, far: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "by_position": [
            {
                "start": start,
                "end": end,
                "tokens": 4 * (end - max(start, 1)),
                "loss": 3.6 - 0.12 * index + 0.11 * far * index,
                "kl": None if far == 0 else 0.01 + 0.12 * far * index,
                "top1_agreement": None if far == 0 else 0.97 - 0.05 * far * index,
            }
            for index, (start, end) in enumerate(pairwise(_BINS))
        ],
        "repeat": [{"distance": distance, "loss": 0.3 + far * distance / 500} for distance in (416, 1500)],
        "recall": [
            {
                "pairs": pairs,
                "distance": distance,
                "queries": 16,
                "accuracy": max(1 - 0.004 * pairs - far * (0.1 + distance / 1300), 1 / pairs),
                "chance": 1 / pairs,
            }
            for pairs in (4, 16, 64)
            for distance in (0, 256, 1024)
        ],
        "choice": {
            "questions": 16,
            "accuracy": 0.5 - far / 8,
            "accuracies": [0.5 - far / 8 + shift for shift in (-0.125, 0.0, 0.0625, 0.0625)],
            "consistency": 0.75 - far / 2,
            "letters": [0.5, 0.25, 0.125, 0.125],
            "agreement": 1 - far / 2,
        },
        "continuations": {
            "tokens": 64,
            "agreement": 1 - far / 2,
            "common_prefix": 32 - 30 * far,
            "repetition": 0.0625 * far,
        },
        "decoding": [
            {
                "context": context,
                "prefilled": context == 2048,
                "decode_seconds": 0.06 + (6e-6 * context if far == 0 else 1e-7 * context),
                "decode_cpu_seconds": 0.11 + (11e-6 * context if far == 0 else 2e-7 * context),
                "prefill_seconds": 0.002 - 0.0004 * far if context == 2048 else None,
                "prefill_cpu_seconds": 0.0038 if context == 2048 else None,
                "cache_bytes": 46_080 * context if far == 0 else 4_423_680 + 1000 * round(far),
            }
            for context in _CONTEXTS
        ],
    }
