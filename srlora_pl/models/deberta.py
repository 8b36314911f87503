"""DeBERTa's attention without repeated work, equal to transformers' up to rounding.

The bias of a score depends on the distance of query and key alone, so a text of L tokens meets at most 2L - 1 of the
relative positions, whatever the batch. transformers projects all of them (512), copies them for every sample, and picks
each of the L x L scores with an index. Here the 2L - 1 live ones are projected once, together with the tokens (so that
an adapted projection merges its pairs once), multiplied with all samples in one product, and shifted into place by a
view. The live rows of the embeddings are known beforehand; transformers finds them in every forward pass, and waits for
the GPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DisentangledSelfAttention,
    make_log_bucket_position,
)

from srlora_pl.util.errors import UserError


def use_fast_attention(net: PreTrainedModel, name: str) -> None:
    """Replace every attention of the DeBERTa-v2 or v3 ``net``, in place; the parameters and their names stay.

    Raises:
        UserError: ``net``, which the user calls ``name``, has no such attention, or a variant without shared keys.
    """
    slow = [(place, each) for place, each in net.named_modules() if isinstance(each, DisentangledSelfAttention)]
    if not slow:
        raise UserError(
            f"model.fast_attention is for DeBERTa-v2 and v3, and model.backbone {name!r} is neither: unset it."
        )
    for place, attention in slow:
        if not (
            attention.relative_attention and attention.share_att_key and {"c2p", "p2c"} <= set(attention.pos_att_type)
        ):
            raise UserError(
                "model.fast_attention needs relative positions with shared keys (share_att_key, pos_att_type c2p|p2c), "
                f"which model.backbone {name!r} does not have: unset it."
            )
        net.set_submodule(place, FastDisentangledAttention(attention))
    for encoder in net.modules():
        if isinstance(encoder, DebertaV2Encoder):
            encoder.register_forward_pre_hook(_LiveRows(encoder), with_kwargs=True)


class _LiveRows:
    """Replaces an encoder's relative positions by the rows of the position embeddings that its texts need.

    Texts of L tokens need the rows of the distances -(L - 1) to L - 1, (2L - 1,), the middle of those of longer texts.
    """

    def __init__(self, encoder: DebertaV2Encoder) -> None:
        self.rows = self._up_to(encoder.max_relative_positions, encoder)

    def __call__(self, encoder: DebertaV2Encoder, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden_states = args[0]
        length, middle = hidden_states.shape[1], len(self.rows) // 2
        if length > middle + 1:
            self.rows, middle = self._up_to(length, encoder), length - 1
        self.rows = self.rows.to(hidden_states.device)
        return args, {**kwargs, "relative_pos": self.rows[middle - (length - 1) : middle + length]}

    @staticmethod
    def _up_to(length: int, encoder: DebertaV2Encoder) -> Tensor:
        distances = torch.arange(-(length - 1), length)
        if encoder.position_buckets > 0:
            buckets = make_log_bucket_position(distances, encoder.position_buckets, encoder.max_relative_positions)
            distances = buckets.long()
        span = len(encoder.rel_embeddings.weight) // 2
        return (distances + span).clamp(0, 2 * span - 1)


class FastDisentangledAttention(nn.Module):
    """Stands in for transformers' ``DisentangledSelfAttention`` and keeps its submodules.

    He et al. 2021 (DeBERTa), Eq. 4: the score of query i and key j is (q_i k_j + q_i K[d] + k_j Q[d]) / sqrt(3 h) with
    d = i - j, Q and K the projected embeddings of the distance.
    """

    def __init__(self, slow: DisentangledSelfAttention) -> None:
        super().__init__()
        self.heads = slow.num_attention_heads
        self.scale = 1 / torch.tensor(3.0 * slow.attention_head_size).sqrt().item()  # in fp32, as transformers has it
        self.query_proj, self.key_proj, self.value_proj = slow.query_proj, slow.key_proj, slow.value_proj
        self.pos_dropout, self.dropout = slow.pos_dropout, slow.dropout
        self.train(slow.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) and mask (B, 1, L, L) to their context (B, L, D), and probabilities (B, heads, L, L).

        ``relative_pos`` (2L - 1,): the rows of ``rel_embeddings`` (2 span, D) by distance, see `_LiveRows`.
        """
        assert query_states is None
        assert relative_pos is not None
        assert rel_embeddings is not None
        samples, length, _ = hidden_states.shape
        live = self.pos_dropout(rel_embeddings)[relative_pos]  # distances of one row have one mask
        both = torch.cat([hidden_states.flatten(0, 1), live])
        query, query_of = self._by_head(self.query_proj(both)).split([samples * length, len(live)], 1)
        key, key_of = self._by_head(self.key_proj(both)).split([samples * length, len(live)], 1)
        value = self._by_head(self.value_proj(hidden_states.flatten(0, 1)))

        shape = (self.heads * samples, length, -1)
        query = query * self.scale
        to_position = _shift((query @ key_of.flip(1).mT).view(*shape))
        from_position = _shift((key @ (query_of * self.scale).mT).view(*shape)).mT
        scores = torch.baddbmm(to_position + from_position, query.reshape(shape), key.reshape(shape).mT)
        scores = scores.view(self.heads, samples, length, length)
        scores = scores.masked_fill(~attention_mask.bool().transpose(0, 1), torch.finfo(scores.dtype).min)
        probabilities = torch.softmax(scores, dim=-1)
        context = torch.bmm(self.dropout(probabilities).view(shape[0], length, length), value.view(*shape))
        context = context.view(self.heads, samples, length, -1).permute(1, 2, 0, 3).flatten(2)
        return context, probabilities.transpose(0, 1) if output_attentions else None

    def _by_head(self, x: Tensor) -> Tensor:
        """(n, D) -> (heads, n, D / heads)."""
        return x.view(len(x), self.heads, -1).transpose(0, 1).contiguous()


def _shift(x: Tensor) -> Tensor:
    """(n, L, 2L - 1) -> view (n, L, L): element (i, j) of the result is element (i, j - i + L - 1) of ``x``."""
    n, length, width = x.shape
    if length == 1:
        return x
    flat = x.reshape(n, -1)[:, length - 1 : length - 1 + length * (width - 1)]
    return flat.view(n, length, width - 1)[:, :, :length]
