"""The forward pass of a gelu-1l, SoLU, GPT-2 or GPT-NeoX transformer up to the sites wanted, and no further.

TransformerBridge computes attention scores, patterns and a hook's copy of everything, so that each can be looked at and
edited; a harvest wants one or two sites and nothing else. Here a pass is a generator that yields each site as it comes
to it, the consumer stops it at the last one wanted, and attention is torch's fused ``scaled_dot_product_attention``.
The bridge stays the reference: what both can do is equal up to float32 rounding (tested site by site), and whatever
this pass does not know (other architectures, other hooks) goes through the bridge's hooks. It keeps no state, so
several threads may share it, as they may not a bridge. ``bench/harvesting.py`` measures both. Rejected:
``torch.compile`` (needs a C++ compiler on the user's machine).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _solu(x: Tensor) -> Tensor:
    """Softmax linear units: x softmax(x). Source: Elhage et al. 2022, Softmax Linear Units."""
    return x * x.softmax(-1)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "solu": _solu,
    "solu_ln": _solu,  # a layer norm of the MLP's own follows
}
_SITES = (
    "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out",
    "hook_resid_post",
)  # fmt: skip


@dataclass(frozen=True)
class _Linear:
    """A linear map; weight (out, in)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Block:
    """The weights of one layer; the norms' weight and bias are None where layer norms have none.

    Attributes:
        activate: the MLP's activation function, with the layer norm that SoLU models have behind it.
        rotation: cosine and sine (n_ctx, rotary_dim) of the positions, where these are rotary.
    """

    norm_1: Callable[[Tensor], Tensor]
    norm_2: Callable[[Tensor], Tensor]
    activate: Callable[[Tensor], Tensor]
    query: _Linear
    key: _Linear
    value: _Linear
    out: _Linear
    mlp_in: _Linear
    mlp_out: _Linear
    n_heads: int
    rotation: tuple[Tensor, Tensor] | None

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention of (n, T, d_model)."""
        x = self.norm_1(x)
        query, key, value = (self._by_head(project(x)) for project in (self.query, self.key, self.value))
        if self.rotation is not None:
            query, key = _rotate(query, *self.rotation), _rotate(key, *self.rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates pairs of (..., T, d_head), a pair being i and i + rotary_dim / 2; the rest of a head stays."""
    n, width = x.shape[-2], cosine.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cosine[:n] + torch.cat([-high, low], -1) * sine[:n], rest], -1)


class FastForward:
    """The forward pass of a transformer whose weights are under TransformerLens's property names.

    Args:
        settings: the model's ``config.json`` in TransformerLens's own layout; for GPT-NeoX also ``parallel_attn_mlp``,
            ``rotary_dim`` and ``rotary_base``.
        state: tensors by property name, such as ``blocks.0.attn.W_Q`` (n_heads, d_model, d_head).
    """

    def __init__(self, settings: Mapping[str, Any], state: Mapping[str, Tensor]):
        self._embed, self._positions = state["embed.W_E"], state.get("pos_embed.W_pos")
        self._parallel = bool(settings.get("parallel_attn_mlp"))
        rotation = _rotation(settings, self._embed) if "rotary_dim" in settings else None
        self._blocks = [_block(settings, state, layer, rotation) for layer in range(settings["n_layers"])]
        sites = [site for site in _SITES if not (self._parallel and site == "hook_resid_mid")]
        self.sites = frozenset(f"blocks.{layer}.{site}" for layer in range(len(self._blocks)) for site in sites)

    @staticmethod
    def knows(settings: Mapping[str, Any]) -> bool:
        """Whether a model of this ``config.json`` is one that this pass computes."""
        norm = settings.get("normalization", settings.get("normalization_type"))
        return settings["act_fn"] in _ACTIVATIONS and norm in {"LN", "LNPre"} and not settings["attn_only"]

    def __call__(self, tokens: Tensor, sites: Collection[str]) -> dict[str, Tensor]:
        """Activations at some sites.

        Args:
            tokens: int64 (n, T), on the weights' device.
            sites: hook names, all of ``self.sites``.

        Returns:
            A tensor (n, T, d) a site.
        """
        found: dict[str, Tensor] = {}
        for site, activation in self._pass(tokens):
            if site in sites:
                found[site] = activation
                if len(found) == len(sites):
                    break
        return found

    def _pass(self, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = F.embedding(tokens, self._embed)
        if self._positions is not None:
            x = x + self._positions[: tokens.shape[1]]
        for layer, block in enumerate(self._blocks):
            name = f"blocks.{layer}"
            yield f"{name}.hook_resid_pre", x
            attended = block.attend(x)
            yield f"{name}.hook_attn_out", attended
            read, x = x, x + attended
            if not self._parallel:
                yield f"{name}.hook_resid_mid", x
                read = x
            pre = block.mlp_in(block.norm_2(read))
            yield f"{name}.mlp.hook_pre", pre
            post = block.activate(pre)
            yield f"{name}.mlp.hook_post", post
            out = block.mlp_out(post)
            yield f"{name}.hook_mlp_out", out
            x = x + out
            yield f"{name}.hook_resid_post", x


def _rotation(settings: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, (n_ctx, rotary_dim), computed in float32."""
    width = settings["rotary_dim"]
    frequencies = settings["rotary_base"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(settings["n_ctx"], dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(like), angles.sin().to(like)


def _block(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], layer: int, rotation: tuple[Tensor, Tensor] | None
) -> _Block:
    weights = {name.removeprefix(f"blocks.{layer}."): tensor for name, tensor in state.items()}

    def projection(letter: str) -> _Linear:
        return _Linear(
            weights[f"attn.W_{letter}"].transpose(1, 2).flatten(0, 1).contiguous(),
            weights[f"attn.b_{letter}"].flatten(),
        )

    def linear(weight: Tensor, bias: Tensor) -> _Linear:
        return _Linear(weight.T.contiguous(), bias)

    def norm(name: str, width: int) -> Callable[[Tensor], Tensor]:
        return partial(
            F.layer_norm, normalized_shape=(width,), eps=settings.get("ln_eps", 1e-5),
            weight=weights.get(f"{name}.w"), bias=weights.get(f"{name}.b"),
        )  # fmt: skip

    d_model, function = settings["d_model"], _ACTIVATIONS[settings["act_fn"]]
    inner = norm("mlp.ln", settings["d_mlp"]) if settings["act_fn"] == "solu_ln" else None

    def activate(x: Tensor) -> Tensor:
        return function(x) if inner is None else inner(function(x))

    return _Block(
        norm_1=norm("ln1", d_model),
        norm_2=norm("ln2", d_model),
        activate=activate,
        query=projection("Q"),
        key=projection("K"),
        value=projection("V"),
        out=linear(weights["attn.W_O"].flatten(0, 1), weights["attn.b_O"]),
        mlp_in=linear(weights["mlp.W_in"], weights["mlp.b_in"]),
        mlp_out=linear(weights["mlp.W_out"], weights["mlp.b_out"]),
        n_heads=settings["n_heads"],
        rotation=rotation,
    )
