"""Functions that `synthetic.py` asks to be learned from examples in the context, and the estimators beside them.

A sequence draws a function f and points x_1, x_2, ...; the model reads x_1, f(x_1), x_2, ... and answers f(x_k) at x_k
(Garg et al., arXiv 2208.01066; the tasks of Park et al., arXiv 2402.04248, at a small size). A number is read as a
vector whose other components are 0. Retrieval asks for vectors by their keys.

Symbols: B batch, n points, d dimension, o components of a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import torch
from synthetic_tasks import Batch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Examples of a function, base of the tasks.

    Args:
        dimension: d of the points.
        points: n; the last one is preceded by n - 1 examples.
    """

    dimension: int
    points: int

    vectors = True
    last_only = False
    # Answers are numbers, judged by their squared error; otherwise classes.
    numbers = True

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.points < 2:
            raise ValueError(f"dimension must be at least 1 and points at least 2, got {self.dimension}, {self.points}")

    @property
    def inputs(self) -> int:
        return self.dimension

    @property
    def outputs(self) -> int:
        return 1 if self.numbers else 2

    @property
    def chance(self) -> float:
        """Return the score of the answer 0, or of a random class."""
        return 0.0 if self.numbers else 0.5

    def sample(self, count: int, random: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Draw (B, n, d) points and (B, n) values of a function for each row."""
        raise NotImplementedError

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (B, n) estimates of the values, each from the points before it only."""
        raise NotImplementedError

    def draw(self, count: int, generator: torch.Generator, first: int = 0) -> Batch:
        """Draw sequences of 2 n - 1 vectors in which the points after at least `first` examples are asked."""
        x, y = self.sample(count, {"generator": generator, "device": generator.device})
        inputs = torch.stack([x, torch.zeros_like(x)], dim=2)
        inputs[:, :, 1, 0] = y
        targets = y[..., None] if self.numbers else (y > 0).long()
        targets = targets.repeat_interleave(2, dim=1)[:, :-1]
        asked = torch.zeros(targets.shape[:2], dtype=torch.bool, device=x.device)
        asked[:, 2 * first :: 2] = True
        return Batch(inputs.flatten(1, 2)[:, :-1], targets, asked)

    def baseline(self, batch: Batch) -> Tensor:
        """Return the estimator's answers to `draw`, as a model has them: (B, 2 n - 1, o) numbers or scores of classes;
        0 where nothing is ever asked."""
        x = batch.inputs[:, ::2]
        y = batch.targets[:, ::2, 0] if self.numbers else 2.0 * batch.targets[:, ::2] - 1
        found = self.estimate(x, y)
        found = found[..., None] if self.numbers else torch.stack([-found, found], dim=-1)
        answers = found.new_zeros(*batch.targets.shape[:2], found.shape[-1])
        answers[:, ::2] = found
        return answers


@dataclass(frozen=True)
class LinearRegression(Examples):
    """y = w x + noise, with x ~ N(0, I); the estimator is least squares of least norm.

    Args:
        weights: number of the components of w that are not 0, all N(0, 1); `dimension` for all of them.
        noise: standard deviation of the noise. The papers have none; without it least squares has no error after d
            examples, and nothing can be compared with it.
    """

    weights: int
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.weights <= self.dimension or self.noise < 0:
            raise ValueError(
                f"weights must be from 1 to dimension and noise at least 0, got {self.weights} and {self.noise}"
            )

    def sample(self, count: int, random: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.points, self.dimension, **random)
        kept = torch.rand(count, self.dimension, **random).argsort(-1) < self.weights
        w = torch.randn(count, self.dimension, **random) * kept
        noise = self.noise * torch.randn(count, self.points, **random)
        return x, (x @ w[..., None])[..., 0] + noise

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        found = [torch.zeros_like(y[:, 0])]
        for k in range(1, self.points):
            w = torch.linalg.pinv(x[:, :k]) @ y[:, :k, None]
            found.append((x[:, k, None] @ w)[:, 0, 0])
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class DecisionTree(Examples):
    """A complete tree whose nodes ask for the sign of a component and whose leaves have values N(0, 1); x ~ N(0, I).
    The estimator is the mean of the three nearest neighbours.

    Args:
        depth: questions on the way to a leaf.
    """

    depth: int

    def sample(self, count: int, random: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.points, self.dimension, **random)
        asked = torch.randint(self.dimension, (count, 2**self.depth), **random)  # of node i, children 2 i and 2 i + 1
        leaves = torch.randn(count, 2**self.depth, **random)
        node = torch.ones(count, self.points, dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            component = x.gather(2, asked.gather(1, node)[..., None])[..., 0]
            node = 2 * node + (component > 0)
        return x, leaves.gather(1, node - 2**self.depth)

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        distance = torch.cdist(x, x)
        found = [torch.zeros_like(y[:, 0])]
        for k in range(1, self.points):
            near = distance[:, k, :k].argsort(-1)[:, :3]
            found.append(y.gather(1, near).mean(1))
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class SparseParity(Examples):
    """The product of `relevant` components, unknown ones, of vectors of signs. The estimator lets all products that
    agree with the examples vote; no one can do better.

    Args:
        relevant: number of the components that are multiplied.
    """

    relevant: int

    numbers = False

    @property
    def blind(self) -> float:
        """Return the best score of answers that read the point and none of the examples.

        With k of d components negative, a product of r of them is positive in a known share of the choices.
        """
        d, r, score = self.dimension, self.relevant, 0.0
        for k in range(d + 1):
            positive = sum(comb(k, j) * comb(d - k, r - j) for j in range(0, r + 1, 2)) / comb(d, r)
            score += comb(d, k) / 2**d * max(positive, 1 - positive)
        return score

    def sample(self, count: int, random: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = 2.0 * torch.randint(2, (count, self.points, self.dimension), **random) - 1
        chosen = torch.rand(count, 1, self.dimension, **random).argsort(-1)[..., : self.relevant]
        return x, x.gather(2, chosen.expand(-1, self.points, -1)).prod(-1)

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        products = torch.stack(
            [x[..., list(chosen)].prod(-1) for chosen in combinations(range(self.dimension), self.relevant)], dim=-1
        )
        wrong = (products != y[..., None]).long()
        before = wrong.cumsum(1) - wrong
        return (products * (before == 0)).sum(-1)


@dataclass(frozen=True)
class VectorRetrieval:
    """Pairs of vectors, a key and its value, then every key once more, in another order: the answer is its value
    (vector-valued MQAR, arXiv 2402.04248). Keys and values are uniform on the unit sphere; the estimator takes the
    value of the nearest key.

    Args:
        dimension: d.
        pairs: n.
    """

    dimension: int
    pairs: int

    vectors = True
    last_only = False
    numbers = True
    chance = 0.0

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.pairs < 1:
            raise ValueError(f"dimension and pairs must be at least 1, got {self.dimension} and {self.pairs}")

    @property
    def inputs(self) -> int:
        return self.dimension

    @property
    def outputs(self) -> int:
        return self.dimension

    def draw(self, count: int, generator: torch.Generator, first: int = 0) -> Batch:
        """Draw sequences of 3 n vectors, in which the queries from number `first` on are asked."""
        random: dict[str, Any] = {"generator": generator, "device": generator.device}
        n = self.pairs
        both = torch.randn(count, 2 * n, self.dimension, **random)
        both = both / both.norm(dim=-1, keepdim=True)
        order = torch.rand(count, n, **random).argsort(-1)[..., None].expand(-1, -1, self.dimension)
        keys, values = both[:, ::2].gather(1, order), both[:, 1::2].gather(1, order)
        inputs = torch.cat([both, keys], dim=1)
        targets = torch.cat([torch.zeros_like(both), values], dim=1)
        asked = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        asked[:, 2 * n + first :] = True
        return Batch(inputs, targets, asked)

    def baseline(self, batch: Batch) -> Tensor:
        """Return the (B, 3 n, d) answers of the nearest key's value; 0 in the context."""
        n = self.pairs
        context, queries = batch.inputs[:, : 2 * n], batch.inputs[:, 2 * n :]
        nearest = torch.cdist(queries, context[:, ::2]).argmin(-1)[..., None].expand_as(queries)
        return torch.cat([torch.zeros_like(context), context[:, 1::2].gather(1, nearest)], dim=1)
