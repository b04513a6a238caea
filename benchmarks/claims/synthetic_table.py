"""The table of `synthetic.py`: tasks with sizes, arms, tests and thresholds, and the claims that their runs judge.

Sizes suit a slow CPU: 20 thousand parameters, a few hundred to two thousand steps. The papers train models of four to a
hundred times this size for up to 500,000 steps, and a claim may be undecided here for that reason alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from synthetic_arms import GRU, MAMBA, MAMBA2, S4D, S4D_REAL, TRANSFORMER, Sizes
from synthetic_claims import Above, Bound, Claim, NearBaseline
from synthetic_functions import DecisionTree, Examples, LinearRegression, SparseParity, VectorRetrieval
from synthetic_tasks import Copying, InductionHeads, Needle, RunningSum

AnyTask = Copying | InductionHeads | Needle | RunningSum | Examples | VectorRetrieval


@dataclass(frozen=True)
class Assessment:
    """Fresh sequences that judge a result.

    Args:
        options: what `draw` is given.
        count: number of sequences.
        arms: arms that are tested; all of the task if not given.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    count: int = 512
    arms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Args:
        task: draws the sequences.
        arms: arms that are compared.
        tests: tests by name.
        steps: of a run that does not solve its task.
        rate: learning rate that the search starts from.
        batch: sequences of a step.
        width: Mamba's width.
        solved: score of the validation sequences at which a run ends; None: no run ends early.
    """

    task: AnyTask
    arms: tuple[str, ...]
    tests: Mapping[str, Assessment]
    steps: int
    rate: float = 8e-3
    batch: int = 32
    width: int = 32
    solved: float | None = 0.99

    def sizes(self) -> Sizes:
        """Return what the arms have to know."""
        return Sizes(self.task.inputs, self.task.outputs, self.task.vectors, self.width)


def lengths(
    option: str, *found: tuple[int, int], arms: dict[int, tuple[str, ...]] | None = None
) -> dict[str, Assessment]:
    """Return tests at lengths, each with its number of sequences, which are named after the lengths."""
    return {
        str(length): Assessment({option: length}, count, None if arms is None else arms.get(length))
        for length, count in found
    }


def second_halves(*found: int) -> dict[str, Assessment]:
    """Return tests of running sums by length, which ask the second half of the positions."""
    return {str(length): Assessment({"length": length, "first": length // 2}, 128) for length in found}


def needles(found: tuple[int, ...], depths: tuple[float, ...]) -> dict[str, Assessment]:
    """Return tests of needles by length and depth."""
    return {
        f"{length} at {depth:.0%}": Assessment({"length": length, "depth": depth}, 256)
        for length in found
        for depth in depths
    }


BOTH = (MAMBA, TRANSFORMER)
ALL = (MAMBA, MAMBA2, TRANSFORMER)
RECURRENT = (MAMBA, MAMBA2)
SPARSE_PARITY = SparseParity(dimension=5, points=24, relevant=2)
SETTINGS: dict[str, Setting] = {
    "selective_copying": Setting(
        Copying(symbols=4, context=60, vocabulary=10),
        (MAMBA, S4D),
        lengths("context", (60, 512), (120, 512)),
        steps=1000,
        batch=16,
    ),
    "copying": Setting(
        Copying(symbols=4, context=60, vocabulary=10, spaced=True),
        (MAMBA, S4D, S4D_REAL),
        lengths("context", (60, 512)),
        steps=1000,
        batch=16,
    ),
    "induction_heads": Setting(
        InductionHeads(length=64),
        ALL,
        lengths(
            "length",
            *((64, 512), (128, 256), (256, 256), (512, 128), (1024, 128), (4096, 64), (16384, 32)),
            arms={4096: RECURRENT, 16384: RECURRENT},
        ),
        steps=2000,
        # Where a run is cut off when it has just solved 64 tokens, what it does beyond them varies more between seeds.
        solved=None,
    ),
    "sparse_parity": Setting(
        SPARSE_PARITY,
        BOTH,
        {"second half": Assessment({"first": 12})},
        steps=4000,
    ),
    "parity": Setting(RunningSum(2, 32), (MAMBA, MAMBA2, TRANSFORMER, GRU), second_halves(32, 64, 256), steps=1000),
    "modular_counting": Setting(
        RunningSum(3, 32),
        (MAMBA, MAMBA2, TRANSFORMER, GRU),
        second_halves(32, 64, 256),
        steps=1000,
        solved=None,  # a GRU that has just learnt 32 tokens does not count beyond them yet
    ),
    "needle": Setting(Needle(length=64), ALL, needles((64, 128, 256), (0.0, 0.5, 1.0)), steps=3000),
    "linear_regression": Setting(
        LinearRegression(dimension=5, points=11, weights=5, noise=0.5),
        BOTH,
        {"after 2 d examples": Assessment({"first": 10}, 2048)},
        steps=1500,
        solved=None,
    ),
    "sparse_regression": Setting(
        LinearRegression(dimension=5, points=11, weights=2, noise=0.5),
        BOTH,
        {"after 2 d examples": Assessment({"first": 10}, 2048)},
        steps=1500,
        solved=None,
    ),
    "decision_tree": Setting(
        DecisionTree(dimension=4, points=20, depth=2),
        BOTH,
        {"second half": Assessment({"first": 10})},
        steps=1500,
        solved=None,
    ),
    "vector_retrieval": Setting(
        VectorRetrieval(dimension=8, pairs=8), BOTH, {"all": Assessment()}, steps=1500, solved=None
    ),
}

CLAIMS = (
    Claim(
        "selection is needed for selective copying",
        "Mamba, arXiv 2312.00752, table 1",
        "Mamba copies at least 97 % of the symbols from random places, and the same block with a time-invariant "
        "recurrence at most 60 %, although it solves the control with constant spacing.",
        (Bound("selective_copying", MAMBA, "60", least=0.97), Bound("selective_copying", S4D, "60", most=0.6)),
        (Bound("selective_copying", MAMBA, "60", most=0.9), Bound("selective_copying", S4D, "60", least=0.8)),
        (Bound("copying", S4D, "60", least=0.95),),
    ),
    Claim(
        "Mamba extrapolates induction heads",
        "Mamba, arXiv 2312.00752, table 2",
        "Trained at 64 tokens, Mamba answers at least 99 % at 16,384.",
        (Bound("induction_heads", MAMBA, "16384", least=0.99),),
        (Bound("induction_heads", MAMBA, "16384", most=0.98),),
        (Bound("induction_heads", MAMBA, "64", least=0.99),),
    ),
    Claim(
        "attention does not extrapolate induction heads",
        "Mamba, arXiv 2312.00752, table 2",
        "Trained at 64 tokens, a Transformer with RoPE answers at most half at 512.",
        (Bound("induction_heads", TRANSFORMER, "512", most=0.5),),
        (Bound("induction_heads", TRANSFORMER, "512", least=0.9),),
        (Bound("induction_heads", TRANSFORMER, "64", least=0.99),),
    ),
    Claim(
        "Mamba learns sparse parity in context, a Transformer does not",
        "Can Mamba learn how to learn, arXiv 2402.04248",
        "From 12 examples on Mamba answers at least 90 %, and the Transformer at most 3 points more than is possible "
        f"without reading the examples ({SPARSE_PARITY.blind:.1%}).",
        (
            Bound("sparse_parity", MAMBA, "second half", least=0.9),
            Bound("sparse_parity", TRANSFORMER, "second half", most=SPARSE_PARITY.blind + 0.03),
        ),
        (Above("sparse_parity", TRANSFORMER, MAMBA, "second half", margin=0.02),),
    ),
    *(
        Claim(
            f"{arm} does not count ({task.replace('_', ' ')})",
            source,
            "Trained at 32 tokens, the answers from 128 to 256 tokens are near chance, and those of a GRU right.",
            (Bound(task, arm, "256", most=chance + 0.1),),
            (Bound(task, arm, "256", least=0.9),),
            (Bound(task, GRU, "256", least=0.99),),
        )
        for task, chance in (("parity", 1 / 2), ("modular_counting", 1 / 3))
        for arm, source in (
            (MAMBA, "Grazzi et al., arXiv 2411.12537"),
            (MAMBA2, "Mamba-3, arXiv 2603.15569"),
            (TRANSFORMER, "Delétang et al., arXiv 2207.02098"),
        )
    ),
    Claim(
        "Mamba is below a Transformer in retrieval",
        "Taipan, arXiv 2410.18572",
        "At the training length the Transformer finds at least 99 % of needles in the middle, and Mamba fewer.",
        (
            Bound("needle", TRANSFORMER, "64 at 50%", least=0.99),
            Above("needle", TRANSFORMER, MAMBA, "64 at 50%", margin=0.02),
        ),
        (
            Bound("needle", MAMBA, "64 at 50%", least=0.99),
            Above("needle", MAMBA, TRANSFORMER, "64 at 50%", margin=0.02),
        ),
        (Bound("needle", TRANSFORMER, "64 at 50%", least=0.5),),
    ),
    *(
        Claim(
            f"Mamba learns {task.replace('_', ' ')} in context",
            "Can Mamba learn how to learn, arXiv 2402.04248",
            "After twice as many examples as dimensions Mamba's error is at most twice that of least squares.",
            (NearBaseline(task, MAMBA, "after 2 d examples", 2.0),),
            (NearBaseline(task, MAMBA, "after 2 d examples", 2.0, reverse=True),),
            (Bound(task, MAMBA, "after 2 d examples", least=0.5),),
        )
        for task in ("linear_regression", "sparse_regression")
    ),
    Claim(
        "Mamba is below a Transformer in vector retrieval",
        "Can Mamba learn how to learn, arXiv 2402.04248",
        "The Transformer explains more of the values' variance than Mamba.",
        (Above("vector_retrieval", TRANSFORMER, MAMBA, "all", margin=0.05),),
        (Above("vector_retrieval", MAMBA, TRANSFORMER, "all", margin=0.05),),
        (Bound("vector_retrieval", TRANSFORMER, "all", least=0.5),),
    ),
)
