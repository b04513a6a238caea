"""Compute what a distillation of a 1B, 8B or 70B teacher takes: tokens, GPU hours and memory. Nothing is run.

The teachers are Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B, by their published configurations. Every attention layer
becomes a mixer with the attention's number of weights. Two budgets: that of RADLADS (arXiv 2505.03005), alignment of
the mixers' outputs and logit distillation at 512 tokens; and that of MOHAWK (arXiv 2408.10189), three stages at 2,048.

    python benchmarks/claims/paper_plan.py

prints the tables of docs/scale.md as Markdown.

Symbols: N parameters, L length, D width, H heads, KV key-value heads, P head width, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK_FLOPS = 989e12
"""Dense bfloat16 operations per second of an H100 SXM or H200, from NVIDIA's data sheet."""
UTILISATION = 0.3
"""Share of these that a run reaches, an assumption; `ssm-zoo distill --plan` measures it on the machine at hand."""
GPU_BYTES = 80e9
FLOAT = 4
LOGITS_BYTES = 64 * 2**20
"""A chunk of one model's logits; four are in memory at a time: of student and teacher, and their gradients."""


@dataclass(frozen=True)
class Teacher:
    """A Llama, by the numbers of its configuration."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    gpus: int
    launch: str
    sequences: int  # of 2,048 tokens on a GPU in a step, with gradient checkpointing

    @property
    def mixer(self) -> int:
        """Weights of the attention of a layer."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)

    @property
    def block(self) -> int:
        """Weights of a layer."""
        return self.mixer + 3 * self.width * self.mlp + 2 * self.width

    @property
    def parameters(self) -> int:
        """All weights, N."""
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * self.block + embeddings + self.width

    def forward_flops(self, length: int) -> float:
        """Return operations per token of a forward pass: 2 per weight that is multiplied, and causal attention."""
        multiplied = self.layers * self.block + self.vocabulary * self.width
        return 2 * multiplied + self.layers * 2 * length * self.heads * self.head_dim


@dataclass(frozen=True)
class Stage:
    """A stage of a budget: tokens, their length, and whether the whole student is trained."""

    name: str
    tokens: float
    length: int
    whole: bool


TEACHERS = (
    Teacher("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256, True, 8, "fsdp2_1x8.yaml", 4),
    Teacher("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, False, 8, "fsdp2_1x8.yaml", 2),
    Teacher("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256, False, 32, "fsdp2_4x8.yaml", 1),
)
BUDGETS = {
    "radlads": (Stage("align", 0.1e9, 512, False), Stage("logits", 0.5e9, 512, True)),
    "mohawk": (
        Stage("matrices", 0.08e9, 2048, False),
        Stage("align", 0.16e9, 2048, False),
        Stage("logits", 2.76e9, 2048, True),
    ),
}


def flops_per_token(teacher: Teacher, stage: Stage) -> float:
    """Return operations per training token: the teacher's forward pass, and the student's forward and backward.

    The backward costs twice the forward. With gradient checkpointing a whole student runs forward once more. In a
    layer-wise stage only the mixers run.
    """
    once = teacher.forward_flops(stage.length)
    if stage.whole:
        return once + 4 * once
    return once + 3 * 2 * teacher.layers * teacher.mixer


def gpu_hours(teacher: Teacher, stage: Stage) -> float:
    """Return the GPU hours of a stage."""
    return stage.tokens * flops_per_token(teacher, stage) / (PEAK_FLOPS * UTILISATION) / 3600


def memory(teacher: Teacher, *, teacher_shards: int = 1, teacher_bytes: int = FLOAT) -> dict[str, float]:
    """Return the bytes of a GPU in logit distillation under FSDP2, by part.

    Args:
        teacher: the teacher.
        teacher_shards: processes that share the teacher; now it is whole in each.
        teacher_bytes: bytes of a number of the teacher's weights; now 4.
    """
    tokens = 2048 * teacher.sequences
    stream = FLOAT * tokens * teacher.width * teacher.layers  # inputs of the blocks
    # One block that is recomputed: 8 arrays of the width, queries, keys, values and outputs, and 4 of the MLP's width.
    heads = (2 * teacher.heads + 2 * teacher.kv_heads) * teacher.head_dim
    block = FLOAT * tokens * (8 * teacher.width + heads + 4 * teacher.mlp)
    gathered = 2 * FLOAT * max(teacher.block, teacher.vocabulary * teacher.width)  # a unit of FSDP and its gradient
    return {
        "teacher": teacher_bytes * teacher.parameters / teacher_shards,
        "student": 4 * FLOAT * teacher.parameters / teacher.gpus,  # weights, gradients, two moments
        "gathered": gathered,
        "activations": stream + block,
        "logits": 4 * LOGITS_BYTES,
    }


def between_stages(teacher: Teacher) -> float:
    """Return the bytes of a GPU between two stages, when teacher and student are whole in every process."""
    return 2 * FLOAT * teacher.parameters


def cost_table() -> str:
    """Return the table of tokens, operations and GPU hours."""
    lines = [
        "| teacher | parameters | budget | tokens | operations | GPU hours | hours on its GPUs |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for teacher in TEACHERS:
        for name, stages in BUDGETS.items():
            tokens = sum(stage.tokens for stage in stages)
            operations = sum(stage.tokens * flops_per_token(teacher, stage) for stage in stages)
            hours = sum(gpu_hours(teacher, stage) for stage in stages)
            lines.append(
                f"| {teacher.name} | {teacher.parameters / 1e9:.2f}B | {name} | {tokens / 1e9:.2f}B | "
                f"{operations:.1e} | {hours:,.0f} | {hours / teacher.gpus:,.1f} on {teacher.gpus} |"
            )
    return "\n".join(lines)


def memory_table() -> str:
    """Return the table of memory and launch files."""
    lines = [
        "| teacher | launch file | teacher | student | gathered | activations | logits | sum | between stages | fits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for teacher in TEACHERS:
        parts = memory(teacher)
        total, whole = sum(parts.values()), between_stages(teacher)
        fits = "yes" if max(total, whole) <= GPU_BYTES else "no"
        cells = " | ".join(f"{size / 1e9:,.1f}" for size in (*parts.values(), total, whole))
        lines.append(f"| {teacher.name} | `{teacher.launch}` | {cells} | {fits} |")
    return "\n".join(lines)


def shared_sentence() -> str:
    """Return the sentence on the largest teacher, if the processes shared it in bfloat16."""
    teacher = TEACHERS[-1]
    total = sum(memory(teacher, teacher_shards=teacher.gpus, teacher_bytes=2).values())
    return (
        f"With its weights in bfloat16 and shared by all {teacher.gpus} processes, {teacher.name} would take "
        f"{total / 1e9:,.0f} GB of each GPU."
    )


if __name__ == "__main__":
    print(cost_table(), memory_table(), shared_sentence(), sep="\n\n")
