"""The gated adapter: visual tokens attend to the reference images' patch features.

One for each transformer block of the U-Net, between self-attention and cross-attention:

    y := y + β · tanh(γ) · S([y, f_p])        (section 3.3 of the paper)

S is self-attention over the concatenation, of which only the y positions are kept. So f_p needs no queries, and its
keys and values depend on neither the step nor the prompt: they are computed once for each concept and layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class References:
    """What the adapters are told of the reference images; travels as an argument through the U-Net.

    It covers the first n rows of the batch. Rows behind them, the unconditional half of guidance, pass unchanged.
    Either `patch_features` (training) or `keys_values` (inference) is set.
    """

    scale: Tensor
    """β, [n, 1, 1]."""
    patch_features: Tensor | None = None
    """f_p, [n, tokens, width]."""
    keys_values: Mapping[str, KeysValues] | None = None
    """Layer name → keys and values of f_p, each [n, heads, tokens, head width]."""
    mask: Tensor | None = None
    """[n, tokens], True where a token is one, False where it is padding; None where there is no padding."""


class GatedAdapter(nn.Module):
    """Attention over visual tokens and patch features behind a gate that starts closed (γ = 0)."""

    def __init__(self, *, layer: str, width: int, feature_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = heads
        self.project = nn.Linear(feature_width, width)
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_k = nn.Linear(width, heads * head_width, bias=False)
        self.to_v = nn.Linear(width, heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def start_from(self, block: BasicTransformerBlock) -> None:
        """Copies the block's own self-attention, which knows already how to read visual tokens."""
        attention = block.attn1
        parts = {
            self.norm: block.norm1,
            self.to_q: attention.to_q,
            self.to_k: attention.to_k,
            self.to_v: attention.to_v,
            self.to_out: attention.to_out[0],
        }
        for own, model in parts.items():
            own.load_state_dict(model.state_dict())

    def forward(self, hidden_states: Tensor, references: References) -> Tensor:
        """y [rows, tokens, width] → y + β · tanh(γ) · S([y, f_p]) in the rows that `references` covers."""
        covered = references.scale.shape[0]
        y = hidden_states[:covered]
        if references.keys_values is not None:
            keys, values = references.keys_values[self.layer]
        else:
            assert references.patch_features is not None
            keys, values = self.keys_values(references.patch_features)
        attended = self._attend(y, keys, values, references.mask)
        updated: Tensor = y + references.scale.to(y.dtype) * torch.tanh(self.gate) * attended
        return torch.cat([updated, hidden_states[covered:]]) if covered < len(hidden_states) else updated

    def keys_values(self, patch_features: Tensor) -> KeysValues:
        """Keys and values of f_p [rows, tokens, feature width], each [rows, heads, tokens, head width]."""
        tokens = self.norm(self.project(patch_features))
        return self._split(self.to_k(tokens)), self._split(self.to_v(tokens))

    def equation(self, y: Tensor, patch_features: Tensor, scale: Tensor) -> Tensor:
        """The paper's equation word for word, with nothing saved: what `forward` must equal."""
        tokens = self.norm(torch.cat([y, self.project(patch_features)], dim=1))
        queries, keys, values = (self._split(part(tokens)) for part in (self.to_q, self.to_k, self.to_v))
        attended = self._merge(F.scaled_dot_product_attention(queries, keys, values))
        updated: Tensor = y + scale * torch.tanh(self.gate) * attended[:, : y.shape[1]]
        return updated

    def _attend(self, y: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.norm(y)
        queries = self._split(self.to_q(tokens))
        keys = torch.cat([self._split(self.to_k(tokens)), keys.to(queries.dtype)], dim=2)
        values = torch.cat([self._split(self.to_v(tokens)), values.to(queries.dtype)], dim=2)
        if mask is not None:
            mask = F.pad(mask, (y.shape[1], 0), value=True)[:, None, None, :]
        return self._merge(attention(queries, keys, values, mask))

    def _split(self, tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)

    def _merge(self, attended: Tensor) -> Tensor:
        return self.to_out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, [rows, heads, tokens, head width].

    While training on a CPU it is written out: the fused kernel's bfloat16 backward takes 4 times as long (measured).
    """
    if queries.device.type != "cpu" or not queries.requires_grad or mask is not None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    scores: Tensor = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ values


class _PassReferences(nn.Module):
    """diffusers hands the adapters' argument through `unet.position_net`; this one leaves it as it is."""

    def forward(self, objs: References) -> References:
        return objs


def attach(unet: UNet2DConditionModel, feature_width: int) -> nn.ModuleDict:
    """Sets an untrained adapter into every transformer block of `unet` and returns them by layer name.

    Each begins as its block's self-attention, behind a closed gate.
    """
    adapters = nn.ModuleDict()
    for name, block in _transformer_blocks(unet).items():
        layer = name.replace(".", "/")
        attention = block.attn1
        adapter = GatedAdapter(
            layer=layer,
            width=attention.to_q.in_features,
            feature_width=feature_width,
            heads=attention.heads,
            head_width=attention.to_q.out_features // attention.heads,
        ).to(device=attention.to_q.weight.device, dtype=attention.to_q.weight.dtype)
        adapter.start_from(block)
        adapters[layer] = block.fuser = adapter
    unet.position_net = _PassReferences()
    return adapters


def detach(unet: UNet2DConditionModel) -> None:
    """Takes the adapters out again; `unet` is then as it was before `attach`."""
    for block in _transformer_blocks(unet).values():
        del block.fuser
    del unet.position_net


def adapter_kwargs(references: References) -> dict[str, object]:
    """The `cross_attention_kwargs` with which a U-Net's forward reaches its adapters."""
    return {"gligen": {"objs": references}}


def _transformer_blocks(unet: UNet2DConditionModel) -> dict[str, BasicTransformerBlock]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}
