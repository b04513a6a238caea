"""The losses of distillation against whole computations in float64: values and gradients."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peak_memory import PeakMemory
from ssm_zoo.distill import logit_losses
from ssm_zoo.distill.layer_losses import alignment_loss, matrix_norm
from ssm_zoo.distill.logit_losses import chunked_logit_loss, logit_loss
from ssm_zoo.kernels.matrix_distance import row_distances_reference

BATCH, LENGTH, WIDTH, VOCAB = 3, 5, 8, 11
PREDICTIONS = [
    pytest.param({}, id="forward"),
    pytest.param({"kl": "reverse"}, id="reverse"),
    pytest.param({"temperature": 2.5}, id="forward, temperature"),
    pytest.param({"kl": "reverse", "temperature": 0.5}, id="reverse, temperature"),
    pytest.param({"ce_weight": 0.3}, id="with cross-entropy"),
    pytest.param({"kl": "reverse", "temperature": 3.0, "ce_weight": 0.6}, id="all"),
    pytest.param({"ce_weight": 1.0}, id="cross-entropy alone"),
    pytest.param({"kl": "mixed", "reverse_weight": 0.2}, id="mixed"),
    pytest.param({"kl": "jsd", "jsd_beta": 0.3}, id="jsd"),
    pytest.param({"kl": "jsd", "jsd_beta": 0.9, "temperature": 2.0, "ce_weight": 0.5}, id="jsd, all"),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_value_and_gradient(loss: Any, expected: Any, at: Tensor) -> None:
    """Equal values, and equal gradients with respect to `at`."""
    point, exact = at.clone().requires_grad_(), at.double().requires_grad_()
    value, wanted = loss(point), expected(exact)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
    value.backward()
    wanted.backward()
    assert point.grad is not None and exact.grad is not None
    assert exact.grad.abs().max() > 0
    torch.testing.assert_close(point.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def plain_kl(p: Tensor, q: Tensor) -> Any:
    return sum(p[word] * (p[word] / q[word]).log() for word in range(len(p)))


def plain_prediction_loss(
    student: Tensor,
    teacher: Tensor,
    targets: list[int],
    *,
    kl: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reverse_weight: float = 0.5,
    jsd_beta: float = 0.5,
) -> Tensor:
    """Token by token and word by word, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs, target in zip(student.double(), teacher.double(), targets, strict=True):
        q = (mine / temperature).exp() / (mine / temperature).exp().sum()
        p = (theirs / temperature).exp() / (theirs / temperature).exp().sum()
        mixture = jsd_beta * p + (1 - jsd_beta) * q
        divergence = (
            temperature**2
            * {
                "forward": plain_kl(p, q),
                "reverse": plain_kl(q, p),
                "mixed": (1 - reverse_weight) * plain_kl(p, q) + reverse_weight * plain_kl(q, p),
                "jsd": jsd_beta * plain_kl(p, mixture) + (1 - jsd_beta) * plain_kl(q, mixture),
            }[kl]
        )
        surprise = -(mine.exp() / mine.exp().sum())[target].log() if target >= 0 else 0.0
        total = total + (1 - ce_weight) * divergence + ce_weight * surprise
    return total


def matrix_loss(student: Tensor, teacher: Tensor, norm: str = "frobenius") -> Tensor:
    return matrix_norm(row_distances_reference(student, teacher), norm)


@pytest.mark.parametrize("norm", ["frobenius", "relative", "rows"])
def test_matrix_norms_are_their_definitions(norm: str) -> None:
    student, teacher = draw(2, 3, 4, 4, seed=0), (4 * draw(2, 3, 4, 4, seed=1)).softmax(-1)

    def expected(matrix: Tensor) -> Tensor:
        norms = []
        for error, target in zip((matrix - teacher).flatten(0, 1), teacher.double().flatten(0, 1), strict=True):
            if norm == "rows":
                rows = [error[row].square().sum() / target[row].square().sum() for row in range(4)]
                norms.append(torch.stack(rows).mean().sqrt())
            else:
                whole = target.norm() if norm == "relative" else 1.0
                norms.append(error.square().sum().sqrt() / whole)
        return torch.stack(norms).mean()

    assert_value_and_gradient(lambda matrix: matrix_loss(matrix, teacher, norm), expected, student)
    assert (norm == "frobenius") == (float(matrix_loss(torch.zeros_like(teacher), teacher, norm)) != pytest.approx(1.0))


def test_rows_count_the_same_however_large_their_entries_are() -> None:
    teacher = torch.eye(8).repeat(1, 1, 1, 1)
    teacher[..., 4:, :] = 1 / 8  # rows of norm 1, then of norm 0.35
    early, late = teacher.clone(), teacher.clone()
    early[..., 1, :] *= 2
    late[..., 6, :] *= 2
    assert matrix_loss(early, teacher) > 2.8 * matrix_loss(late, teacher)
    torch.testing.assert_close(matrix_loss(early, teacher, "rows"), matrix_loss(late, teacher, "rows"))


@pytest.mark.parametrize("norm", ["frobenius", "relative", "rows"])
def test_matrix_loss_has_a_gradient_where_it_is_zero(norm: str) -> None:
    teacher = draw(1, 2, 4, 4, seed=1).softmax(-1)
    student = teacher.clone().requires_grad_()
    loss = matrix_loss(student, teacher, norm)
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros_like(teacher))


@pytest.mark.parametrize("norm", ["frobenius", "relative", "rows"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_one_head_is_nan_in_the_matrix_loss(norm: str, side: str) -> None:
    sides = {"student": draw(2, 3, 4, 4, seed=0), "teacher": draw(2, 3, 4, 4, seed=1).softmax(-1)}
    sides[side][1, 2, 3, 0] = torch.nan
    assert matrix_loss(**sides, norm=norm).isnan()


def test_alignment_loss_is_the_mean_relative_squared_error() -> None:
    student, teacher = draw(2, 4, 3, seed=0), draw(2, 4, 3, seed=1) * torch.tensor([1.0, 30.0])[:, None, None]

    def expected(output: Tensor) -> Tensor:
        errors = [(output[b] - teacher[b]).square().sum() / teacher[b].double().square().sum() for b in range(2)]
        return (errors[0] + errors[1]) / 2

    assert_value_and_gradient(lambda output: alignment_loss(output, teacher), expected, student)
    assert alignment_loss(torch.zeros_like(teacher), teacher) == pytest.approx(1.0)
    assert alignment_loss(teacher, teacher) == 0


def test_alignment_with_a_silent_target_is_finite() -> None:
    silent = torch.zeros(2, 4, 3)
    assert alignment_loss(silent, silent) == 0
    assert alignment_loss(silent + 1, silent).isfinite()


@pytest.mark.parametrize("options", PREDICTIONS)
def test_logit_loss_is_the_definition(options: dict[str, Any]) -> None:
    student, teacher = 2 * draw(6, VOCAB, seed=0), 2 * draw(6, VOCAB, seed=1)
    targets = [3, 0, -100, 10, 3, -100]

    def expected(logits: Tensor) -> Tensor:
        return plain_prediction_loss(logits, teacher, targets, **options)

    assert_value_and_gradient(
        lambda logits: logit_loss(logits, teacher, torch.tensor(targets), **options), expected, student
    )


def test_logit_loss_knows_its_bounds() -> None:
    teacher, targets = 2 * draw(4, VOCAB, seed=1), torch.zeros(4, dtype=torch.long)
    for kl in ("forward", "reverse"):
        assert logit_loss(teacher + 5, teacher, targets, kl=kl) == pytest.approx(0.0, abs=1e-5)
        assert logit_loss(-teacher, teacher, targets, kl=kl) > 1
    one_word = torch.full((4, VOCAB), -1e4).index_fill(1, torch.tensor([2]), 0.0)
    uniform = torch.zeros(4, VOCAB)
    # A teacher that is certain, and a student that is not: log V a token, and no 0 log 0.
    assert logit_loss(uniform, one_word, targets) == pytest.approx(4 * math.log(VOCAB), rel=1e-5)
    assert logit_loss(one_word, uniform, targets, kl="reverse") == pytest.approx(4 * math.log(VOCAB), rel=1e-5)


def test_the_jensen_shannon_divergence_tends_to_the_kl_divergences() -> None:
    # GKD: divided by the weight that vanishes, it is the forward KL for a small beta and the reverse one for a large.
    student, teacher = draw(4, VOCAB, seed=0), draw(4, VOCAB, seed=1)
    targets = torch.zeros(4, dtype=torch.long)

    def jsd(beta: float) -> float:
        return float(logit_loss(student, teacher, targets, kl="jsd", jsd_beta=beta)) / min(beta, 1 - beta)

    assert jsd(1e-3) == pytest.approx(float(logit_loss(student, teacher, targets)), rel=0.02)
    assert jsd(1 - 1e-3) == pytest.approx(float(logit_loss(student, teacher, targets, kl="reverse")), rel=0.02)
    assert jsd(0.5) / 2 <= 4 * math.log(2)  # bounded, however far apart the models are
    assert float(logit_loss(100 * student, -100 * teacher, targets, kl="jsd")) <= 4 * math.log(2) + 1e-4


def test_the_temperature_keeps_the_scale_of_the_gradient() -> None:
    # Hinton et al., section 2: for high temperatures the gradient tends to that of half the squared logit distance / V.
    student, teacher = draw(1, VOCAB, seed=0), draw(1, VOCAB, seed=1)
    centred = [logits - logits.mean() for logits in (student, teacher)]
    point = student.clone().requires_grad_()
    logit_loss(point, teacher, torch.zeros(1, dtype=torch.long), temperature=1e3).backward()
    torch.testing.assert_close(point.grad, (centred[0] - centred[1]) / VOCAB, rtol=0.01, atol=1e-3)


class Pair:
    """A student and a teacher that are a projection each, and heads."""

    def __init__(self) -> None:
        self.inputs, self.theirs = draw(BATCH, LENGTH, WIDTH, seed=2), draw(BATCH, LENGTH, WIDTH, seed=3)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head, self.teacher_head = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            for seed, parameter in enumerate((*self.body.parameters(), self.head.weight, self.teacher_head.weight)):
                parameter.copy_(draw(*parameter.shape, seed=10 + seed))
        self.teacher_head.requires_grad_(False)
        self.ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))

    def backward(self, rows: slice, **options: Any) -> float:
        """The loss under test, with gradients left in the parameters."""
        hidden = torch.tanh(self.body(self.inputs[rows]))
        loss = chunked_logit_loss(hidden, self.head, self.theirs[rows], self.teacher_head, self.ids[rows], **options)
        loss.backward()
        return loss.item()

    def gradients(self) -> list[Tensor]:
        parameters = [*self.body.parameters(), self.head.weight]
        taken = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        assert len(taken) == 3
        for parameter in parameters:
            parameter.grad = None
        return taken

    def whole(self, **options: Any) -> float:
        """The same with all logits at once, by autograd alone."""
        student = self.head(torch.tanh(self.body(self.inputs))).flatten(0, 1)
        teacher = self.teacher_head(self.theirs).flatten(0, 1)
        targets = [
            int(self.ids[row, token + 1]) if token + 1 < LENGTH else -100
            for row in range(BATCH)
            for token in range(LENGTH)
        ]
        loss = plain_prediction_loss(student, teacher, targets, **options) / (BATCH * LENGTH)
        loss.backward()
        return float(loss.detach())


@pytest.mark.parametrize("rows", [1, 4, BATCH * LENGTH, 1000], ids=lambda rows: f"{rows} tokens at a time")
@pytest.mark.parametrize("options", PREDICTIONS)
def test_chunked_backward_is_the_whole_one(options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_losses, "_LOGITS_BYTES", 4 * VOCAB * rows)
    pair, sizes = Pair(), []
    pair.head.register_forward_hook(lambda _module, _args, logits: sizes.append(len(logits)))
    value = pair.backward(slice(None), **options)
    assert max(sizes) <= rows and sum(sizes) == BATCH * LENGTH
    gradients = pair.gradients()
    assert value == pytest.approx(pair.whole(**options), rel=1e-5)
    for gradient, expected in zip(gradients, pair.gradients(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_logits_of_a_large_vocabulary_are_not_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, words = 256, 4096
    monkeypatch.setattr(logit_losses, "_LOGITS_BYTES", 4 * words * 8)
    hidden = draw(1, tokens, WIDTH, seed=0).requires_grad_()
    head, teacher_head = (nn.Linear(WIDTH, words, bias=False) for _ in range(2))
    teacher_head.requires_grad_(False)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for kl in ("forward", "reverse", "mixed", "jsd"):
        with PeakMemory(hidden, head.weight, teacher_head.weight) as memory:
            chunked_logit_loss(hidden, head, hidden.detach(), teacher_head, ids, kl=kl, ce_weight=0.5).backward()
        assert memory.peak < 4 * tokens * words * 4 / 8, kl  # an eighth of four arrays of logits


def test_a_chunk_is_at_least_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_losses, "_LOGITS_BYTES", 1)
    pair = Pair()
    value = pair.backward(slice(None))
    assert value == pytest.approx(pair.whole(), rel=1e-5)


def test_gradients_add_to_those_that_are_there() -> None:
    pair = Pair()
    pair.backward(slice(None))
    once = pair.gradients()
    pair.backward(slice(None))
    pair.backward(slice(None))
    for twice, gradient in zip(pair.gradients(), once, strict=True):
        torch.testing.assert_close(twice, 2 * gradient)


@pytest.mark.parametrize("options", PREDICTIONS)
def test_shards_of_a_batch_average_to_the_whole(options: dict[str, Any]) -> None:
    pair = Pair()
    whole = pair.backward(slice(None), **options)
    expected = pair.gradients()
    shards = [pair.backward(slice(row, row + 1), **options) for row in range(BATCH)]
    assert sum(shards) / BATCH == pytest.approx(whole, rel=1e-5)
    for gradient, wanted in zip(pair.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient / BATCH, wanted, rtol=1e-4, atol=1e-6)


def test_shards_of_layerwise_losses_average_to_the_whole() -> None:
    student, teacher = draw(4, 3, 5, 5, seed=0), draw(4, 3, 5, 5, seed=1)
    for loss in (matrix_loss, lambda a, b: alignment_loss(a.flatten(1, 2), b.flatten(1, 2))):
        shards = [loss(student[rows], teacher[rows]) for rows in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close((shards[0] + shards[1]) / 2, loss(student, teacher))


def test_bfloat16_activations_are_compared_in_float32() -> None:
    student, teacher = draw(2, 4, 3, seed=0).bfloat16(), draw(2, 4, 3, seed=1).bfloat16()
    assert alignment_loss(student, teacher).dtype == torch.float32
    torch.testing.assert_close(alignment_loss(student, teacher), alignment_loss(student.float(), teacher.float()))
    logits, theirs = draw(4, VOCAB, seed=0).bfloat16(), draw(4, VOCAB, seed=1).bfloat16()
    targets = torch.zeros(4, dtype=torch.long)
    for kl in ("forward", "reverse"):
        value = logit_loss(logits, theirs, targets, kl=kl, ce_weight=0.5)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, logit_loss(logits.float(), theirs.float(), targets, kl=kl, ce_weight=0.5))


def test_a_tied_head_gets_the_gradients_of_both_its_uses() -> None:
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(draw(VOCAB, WIDTH, seed=5))
    teacher_head = nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    ids, theirs = torch.tensor([[1, 4, 2]]), draw(1, 3, WIDTH, seed=6)
    chunked_logit_loss(torch.tanh(F.embedding(ids, head.weight)), head, theirs, teacher_head, ids).backward()
    gradient, head.weight.grad = head.weight.grad, None
    student, teacher = head(torch.tanh(F.embedding(ids, head.weight)))[0], teacher_head(theirs)[0]
    (plain_prediction_loss(student, teacher, [4, 2, -100]) / 3).backward()
    torch.testing.assert_close(gradient, head.weight.grad, rtol=1e-4, atol=1e-6)
