"""The equations of gelu-1l's and SoLU's transformers, head by head, in float64: nothing shared with the code tested."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def by_hand(
    weights: Mapping[str, Tensor], tokens: Tensor, act_fn: str = "gelu", eps: float = 1e-5
) -> dict[str, Tensor]:
    """Every site of every layer, and the logits.

    Args:
        weights: by TransformerLens's property names; W_Q (n_heads, d_model, d_head) and its like.
        tokens: int64 (n, T).
        act_fn: ``gelu``, ``solu`` or ``solu_ln``.
        eps: of layer norms.

    Returns:
        float64 tensors by hook name, and ``logits``.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    act = _ACTIVATIONS[act_fn]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.w"] + w[f"{name}.b"]

    found: dict[str, Tensor] = {}
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    layer = 0
    while f"blocks.{layer}.attn.W_Q" in w:
        at = f"blocks.{layer}"
        found[f"{at}.hook_resid_pre"] = x
        attended = found[f"{at}.hook_attn_out"] = _attention(w, at, norm(x, f"{at}.ln1"))
        x = found[f"{at}.hook_resid_mid"] = x + attended
        pre = found[f"{at}.mlp.hook_pre"] = norm(x, f"{at}.ln2") @ w[f"{at}.mlp.W_in"] + w[f"{at}.mlp.b_in"]
        post = norm(act(pre), f"{at}.mlp.ln") if act_fn == "solu_ln" else act(pre)
        found[f"{at}.mlp.hook_post"] = post
        out = found[f"{at}.hook_mlp_out"] = post @ w[f"{at}.mlp.W_out"] + w[f"{at}.mlp.b_out"]
        x = found[f"{at}.hook_resid_post"] = x + out
        layer += 1
    logits = norm(x, "ln_final") @ w["unembed.W_U"]
    return found | {"logits": logits + w["unembed.b_U"] if "unembed.b_U" in w else logits}


def _attention(w: Mapping[str, Tensor], at: str, y: Tensor) -> Tensor:
    length = y.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = w[f"{at}.attn.b_O"]
    for head in range(len(w[f"{at}.attn.W_Q"])):
        q, k, v = (y @ w[f"{at}.attn.W_{letter}"][head] + w[f"{at}.attn.b_{letter}"][head] for letter in "QKV")
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        out = out + scores.exp() / scores.exp().sum(-1, keepdim=True) @ v @ w[f"{at}.attn.W_O"][head]
    return out


def _solu(x: Tensor) -> Tensor:
    shares = (x - x.amax(-1, keepdim=True)).exp()
    return x * shares / shares.sum(-1, keepdim=True)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "solu": _solu,
    "solu_ln": _solu,
}
