"""The retrieval mixer, which mixes the embeddings of a query and of candidates and scores every candidate.

Paper: Badger, "Masked Mixers for Language Generation and Retrieval" (arXiv 2409.01482), section on retrieval; code:
blbadger/maskedmixers@8f9515d, `mixer_lm/retrieval_mixer_tinystories.py`. The embeddings come from another model,
e.g. the last hidden states of a masked mixer at the last token but one.

    x = [query, candidates];  x = x + mix(norm(x));  x = x + mlp(norm(x))  in every block;  scores = x[1:] w + b

Rows are mixed by a dense matrix without a mask, with a weight for each pair of places. A score therefore depends on a
candidate's place; in training the right candidate is put at a random place.

Deviations: there may be fewer candidates than places, and missing ones among them. Missing candidates count as if their
normed states were zero, and score the lowest number.

Symbols: B batch, M rows (the query and M - 1 candidates), N places, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from ..kernels.tracing import host_reads, tracing
from .configuration_retrieval_mixer import RetrievalMixerConfig
from .layers import LayerNorm, PlainMLP, as_weight, init_linear, normed
from .mixer import initialise_alone
from .pretrained import ZooPreTrainedModel


@dataclass
class RetrievalMixerOutput(ModelOutput):
    """Scores of candidates.

    Attributes:
        loss: () cross-entropy of the right candidates, if labels were given.
        logits: (B, M - 1) scores.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class OpenMixer(nn.Module):
    """`y_i = sum_j W_ij x_j + b_i` over all places."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, places))
        self.bias = nn.Parameter(torch.empty(places))
        initialise_alone(self.initialise)

    def initialise(self) -> None:
        """U(+-1 / sqrt(N)), as of a convolution over N channels."""
        bound = self.weight.shape[0] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) to (B, M, D)."""
        rows = x.shape[1]
        if tracing():  # a graph with a slice would hold for fewer rows than places only, or for as many only
            row = torch.arange(rows, device=x.device)
            return self.weight[row[:, None], row] @ x + self.bias[row, None]
        return self.weight[:rows, :rows] @ x + self.bias[:rows, None]


class RetrievalMixerBlock(GradientCheckpointingLayer):
    """Mixing and MLP, each added to the stream."""

    def __init__(self, config: RetrievalMixerConfig) -> None:
        super().__init__()
        self.token_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mixer = OpenMixer(config.max_position_embeddings)
        self.channel_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = PlainMLP(config.hidden_size, int(config.intermediate_size or 0), act=config.hidden_act)

    def forward(self, hidden_states: Tensor, present: Tensor | None) -> Tensor:
        """(B, M, D) states to (B, M, D); `present` (B, M) is False where a candidate is missing."""
        x = normed(self.token_norm, hidden_states)
        if present is not None:
            x = x.masked_fill(~present[..., None], 0)
        hidden_states = hidden_states + self.mixer(x)
        return hidden_states + self.mlp(normed(self.channel_norm, hidden_states))


class RetrievalMixer(ZooPreTrainedModel):
    """Scores candidates for a query, by their embeddings."""

    config: RetrievalMixerConfig
    config_class = RetrievalMixerConfig
    main_input_name = "query_embeds"
    accepts_loss_kwargs = False
    _no_split_modules = ["RetrievalMixerBlock"]
    auto_class = "AutoModel"

    def __init__(self, config: RetrievalMixerConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([RetrievalMixerBlock(config) for _ in range(config.num_hidden_layers)])
        self.retrieval_head = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init_linear(module)

    def example_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        rows, width = self.config.max_position_embeddings, self.config.hidden_size
        query = torch.randn(1, width, generator=generator)
        return {"query_embeds": query, "candidate_embeds": torch.randn(1, rows - 1, width, generator=generator)}

    def forward(
        self,
        query_embeds: Tensor,
        candidate_embeds: Tensor,
        candidate_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> RetrievalMixerOutput | tuple:
        """Score candidates.

        Args:
            query_embeds: (B, D) embeddings of the queries.
            candidate_embeds: (B, M - 1, D) embeddings of their candidates, at most N - 1.
            candidate_mask: (B, M - 1), 0 where there is no candidate.
            labels: (B) index of the right candidate.
            return_dict: return a ModelOutput rather than a tuple.

        Raises:
            ValueError: if a shape does not fit, or a label is not the index of a candidate.
        """
        batch, width = query_embeds.shape[0], self.config.hidden_size
        if tuple(query_embeds.shape) != (batch, width):
            raise ValueError(f"query_embeds must be (B, D) = (any, {width}), got {tuple(query_embeds.shape)}")
        most = self.config.max_position_embeddings - 1
        count = candidate_embeds.shape[1] if candidate_embeds.dim() == 3 else 0
        if tuple(candidate_embeds.shape) != (batch, count, width) or not 1 <= count <= most:
            raise ValueError(
                f"candidate_embeds must be (B, M - 1, D) = ({batch}, 1 to {most}, {width}), "
                f"got {tuple(candidate_embeds.shape)}"
            )
        present = None
        if candidate_mask is not None:
            if tuple(candidate_mask.shape) != (batch, count):
                raise ValueError(
                    f"candidate_mask must be (B, M - 1) = ({batch}, {count}), got {tuple(candidate_mask.shape)}"
                )
            present = F.pad(candidate_mask != 0, (1, 0), value=True)
        if labels is not None:
            self._check_labels(labels, batch, count, candidate_mask)
        hidden_states = torch.cat([query_embeds[:, None], candidate_embeds], dim=1)
        if present is not None:  # missing candidates may hold any values
            hidden_states = hidden_states.masked_fill(~present[..., None], 0)
        for block in self.layers:
            hidden_states = block(hidden_states, present)
        head = self.retrieval_head
        logits = head(as_weight(head, hidden_states[:, 1:]))[..., 0]
        if present is not None:
            logits = logits.masked_fill(~present[:, 1:], torch.finfo(logits.dtype).min)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = RetrievalMixerOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _check_labels(labels: Tensor, batch: int, count: int, candidate_mask: Tensor | None) -> None:
        if tuple(labels.shape) != (batch,) or labels.is_floating_point():
            raise ValueError(f"labels must be (B) = ({batch}) integers, got {tuple(labels.shape)} of {labels.dtype}")
        if not host_reads(labels):
            return
        if bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"labels must be from 0 to {count - 1}, got {labels.tolist()}")
        if candidate_mask is not None and bool((candidate_mask.gather(1, labels[:, None]) == 0).any()):
            raise ValueError(f"labels must be candidates that candidate_mask includes, got {labels.tolist()}")


__all__ = ["RetrievalMixer", "RetrievalMixerOutput"]
