"""Metrics as `evaluate.Metric` objects that need no script from the Hub, alone or together in `evaluate.combine`."""

from .distillation import DistillationGap, KLDivergence, Perplexity, Top1Agreement
from .ranking import Ranking
from .translation import BLEU, ChrF, EntityRecall

__all__ = ["BLEU", "ChrF", "DistillationGap", "EntityRecall", "KLDivergence", "Perplexity", "Ranking", "Top1Agreement"]
