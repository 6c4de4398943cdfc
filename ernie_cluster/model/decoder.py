"""The text decoder: embedding, layers over paged KV, final norm and head.

Knows no scheduler and no sampling. Parameters are fused (q, k and v in one matrix; gate and up in one); `weights.py`
says which checkpoint tensor goes where. Shapes: T tokens, D hidden, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ernie_cluster.config.model import TextConfig
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.errors import ConfigError
from ernie_cluster.model.group import ALONE, Place
from ernie_cluster.model.moe import GatedMLP, SparseMLP
from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.rope import TextRope
from ernie_cluster.model.step import KVCache, StepInput
from ernie_cluster.model.storage import Storage


def no_hook(layer: int) -> None:
    """Nobody wants to know."""


class Attention(nn.Module):
    """Grouped-query attention over paged KV: H query and G KV heads, those of one rank."""

    def __init__(self, config: TextConfig, storage: Storage, ops: TorchOps, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.ops, self.num_heads, self.tp = ops, shard.share_of(config.num_heads), ALONE.tp
        num_kv_heads = len(shard.kv_heads(config.num_kv_heads))
        rows = (self.num_heads + 2 * num_kv_heads) * config.head_dim
        self.qkv = storage.linear(rows, config.hidden_size)  # [(H + 2G) * head_dim, D]: q, k, v
        self.out = storage.linear(config.hidden_size, self.num_heads * config.head_dim)

    def forward(
        self, x_TD: Tensor, cos_TF: Tensor, sin_TF: Tensor, pages: tuple[Tensor, Tensor], step: StepInput
    ) -> Tensor:
        qkv = self.ops.linear(x_TD, self.qkv)
        q = self.ops.rotate_and_store(qkv, cos_TF, sin_TF, step.slots_T, pages, self.num_heads)
        return self.tp.add(self.ops.linear(self.ops.attention(q, pages, step), self.out))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the sum travels beside x so that each norm can add it."""

    def __init__(
        self,
        config: TextConfig,
        index: int,
        *,
        has_vision_experts: bool,
        storage: Storage,
        ops: TorchOps,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__()
        self.ops, self.eps, self.tp = ops, config.rms_norm_eps, ALONE.tp
        self.input_norm = storage.plain(config.hidden_size)
        self.attention = Attention(config, storage, ops, shard)
        self.post_attention_norm = storage.plain(config.hidden_size)
        self.mlp: SparseMLP | GatedMLP
        if index in config.sparse_layers:
            self.mlp = SparseMLP(config, has_vision_experts=has_vision_experts, storage=storage, ops=ops, shard=shard)
        else:
            self.mlp = GatedMLP(config.hidden_size, shard.share_of(config.intermediate_size), storage, ops)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        pages: tuple[Tensor, Tensor],
        step: StepInput,
        chosen: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.ops.add_rms_norm(x_TD, residual_TD, self.input_norm, self.eps)
        x_TD = self.attention(x_TD, cos_TF, sin_TF, pages, step)
        x_TD, residual_TD = self.ops.add_rms_norm(x_TD, residual_TD, self.post_attention_norm, self.eps)
        return self.tp.add(self.mlp(x_TD, step.is_vision_T, chosen)), residual_TD

    def connect(self, place: Place) -> None:
        """Add up with the peers of a gang."""
        self.tp = self.attention.tp = place.tp
        if isinstance(self.mlp, SparseMLP):
            self.mlp.connect(place)


class Decoder(nn.Module):
    """The whole text model.

    Args:
        config: its shape, whole.
        has_vision_experts: False on decode replicas, whose tokens are all text.
        storage: how its matrices are held; routers are float32.
        ops: the kernels.
        shard: the part that this rank holds. Attention, dense MLPs and shared experts are then the rank's share of a sum
            over tp, the experts its share of a sum over ep.
    """

    def __init__(
        self, config: TextConfig, *, has_vision_experts: bool, storage: Storage, ops: TorchOps, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        if config.use_bias:
            raise ConfigError(
                "use_bias true: no published model of the family has biases in its decoder; not supported"
            )
        self.config, self.ops, self.shard = config, ops, shard
        self.embed = storage.plain(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, has_vision_experts=has_vision_experts, storage=storage, ops=ops, shard=shard)
            for i in range(config.num_layers)
        )
        self.norm = storage.plain(config.hidden_size)
        if not config.tie_word_embeddings:
            self.head = storage.plain(config.vocab_size, config.hidden_size)
        self._rope: TextRope | None = None
        self.sparse = [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMLP)]
        num_experts = self.sparse[0].router.num_experts * self.sparse[0].router.num_pools if self.sparse else 0
        self.routed_LE = torch.zeros(len(self.sparse), num_experts, dtype=torch.int64)
        """How often each expert of each sparse layer was chosen by this rank's tokens, ever."""
        self._one = torch.ones(1, 1, dtype=torch.int64)

    def connect(self, place: Place) -> None:
        """Run together with the other ranks of a gang from now on; each calls `forward` as often as all others."""
        assert place.shard == self.shard, f"built for {self.shard}, placed at {place.shard}"
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.connect(place)

    def forward(self, step: StepInput, kv: KVCache, layer_done: Callable[[int], None] = no_hook) -> Tensor:
        """Logits of the wanted rows, float32 [R, V]; K and V of all tokens are written to `kv`.

        Args:
            step: the tokens.
            kv: changed in place.
            layer_done: called after each layer's K and V are written, with the layer's index.
        """
        if self._rope is None:
            c = self.config
            self._rope = TextRope(c.head_dim, c.rope_theta, c.mrope_section, self.embed.device)
        cos_TF, sin_TF = self._rope(step.positions_3T)
        x = self.embed.index_select(0, step.token_ids_T)
        if step.media_embeds is not None:
            x.index_copy_(0, step.media_rows, step.media_embeds)
        residual, chosen = torch.zeros_like(x), list[Tensor]()
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos_TF, sin_TF, kv.layer(i), step, chosen)
            layer_done(i)
        if chosen:  # one addition for all layers, and no question to the device
            chosen_LX = torch.stack(chosen).flatten(1)
            self.routed_LE.scatter_add_(1, chosen_LX, self._one.expand_as(chosen_LX))
        x, residual = x.index_select(0, step.logits_rows), residual.index_select(0, step.logits_rows)
        x, _ = self.ops.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)
        return self.ops.linear(x, self.embed if self.config.tie_word_embeddings else self.head).float()
