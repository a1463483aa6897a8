"""Models under TransformerLens's property names: read, checked tensor by tensor, and booted as a native bridge.

The format is that of gelu-1l's repository and of the shipped demo model: a flat ``config.json``, and a state dict with
``blocks.0.attn.W_Q`` (n_heads, d_model, d_head) and its like. What TransformerLens 4.3 offers for it,
``boot_tl_legacy``, asks the Hub for a list of files even where all are cached; its parts do not: a config, a native
bridge, ``convert_tl_checkpoint``, a strict load. Tensors are compared with the shapes that the config implies first, so
that a checkpoint that does not fit is named by its own keys, before anything is converted.

Weights stay as they are in the file: W_out is not centred, layer norms are not folded. A missing unembedding bias is
zero (gelu-1l has none), as in TransformerLens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model_files import ModelFiles
from pipeline.tensor_files import load_pt
from storage.errors import ConfigError, InputError

Shape = tuple[int, ...]

_REQUIRED = ("n_layers", "d_model", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")
_BUFFERS = (".attn.mask", ".attn.IGNORE")  # of the program that saved it, not weights
_SHOWN = 4


def read_properties(files: ModelFiles) -> dict[str, Tensor]:
    """Reads and checks a model's tensors.

    Returns:
        float32 tensors by property name, on the CPU; buffers are left out.

    Raises:
        ConfigError: the config lacks something, or asks for what the native bridge does not compute.
        InputError: the file does not read, or its tensors are not those of the config.
    """
    expected = property_shapes(files.settings, files.config)
    state = {name: tensor for name, tensor in _read(files.weights[0]).items() if not name.endswith(_BUFFERS)}
    state.setdefault("unembed.b_U", torch.zeros(files.settings["d_vocab"]))
    _check(state, expected, files.weights[0])
    return {name: tensor.float() for name, tensor in state.items()}


def property_shapes(settings: Mapping[str, Any], where: Path) -> dict[str, Shape]:
    """Shape of each tensor of a model, by property name.

    Args:
        settings: what its ``config.json`` says.
        where: that file, for the error.

    Raises:
        ConfigError: something is missing, or is not a model of this format.
    """
    missing = [
        name for name in (*_REQUIRED, *(() if settings.get("attn_only") else ("d_mlp",))) if name not in settings
    ]
    if missing:
        raise ConfigError("the model's config lacks settings", where=where, found=f"no {', '.join(missing)}")
    if settings.get("shortformer_pos"):
        raise ConfigError("the model has shortformer positions, which TransformerBridge does not compute", where=where)
    d, heads, width = settings["d_model"], settings["n_heads"], settings["d_head"]
    attention: dict[str, Shape] = {f"attn.W_{letter}": (heads, d, width) for letter in "QKV"}
    attention |= {f"attn.b_{letter}": (heads, width) for letter in "QKV"}
    block = attention | {"attn.W_O": (heads, width, d), "attn.b_O": (d,)} | _norm(settings, "ln1", d)
    if not settings["attn_only"]:
        hidden = settings["d_mlp"]
        block |= {"mlp.W_in": (d, hidden), "mlp.b_in": (hidden,), "mlp.W_out": (hidden, d), "mlp.b_out": (d,)}
        block |= _norm(settings, "ln2", d)
        if settings["act_fn"] == "solu_ln":
            block |= {"mlp.ln.w": (hidden,), "mlp.ln.b": (hidden,)}
    whole: dict[str, Shape] = {"embed.W_E": (settings["d_vocab"], d), "pos_embed.W_pos": (settings["n_ctx"], d)}
    whole |= {f"blocks.{layer}.{name}": shape for layer in range(settings["n_layers"]) for name, shape in block.items()}
    whole |= _norm(settings, "ln_final", d)
    return whole | {"unembed.W_U": (d, settings["d_vocab"]), "unembed.b_U": (settings["d_vocab"],)}


def normalization(settings: Mapping[str, Any]) -> str | None:
    """Which norm a model has, such as ``LN``, or ``LNPre`` without weights."""
    return settings.get("normalization", settings.get("normalization_type"))


def boot_properties(files: ModelFiles, state: Mapping[str, Tensor], device: str, dtype: torch.dtype) -> Any:
    """A native TransformerBridge with these weights, in eval mode.

    Raises:
        ConfigError: the config asks for what the native bridge does not compute.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    settings = files.settings
    config = TransformerBridgeConfig(
        d_model=settings["d_model"],
        n_layers=settings["n_layers"],
        d_mlp=settings.get("d_mlp"),
        d_head=settings["d_head"],
        n_heads=settings["n_heads"],
        n_ctx=settings["n_ctx"],
        d_vocab=settings["d_vocab"],
        act_fn=settings["act_fn"],
        attn_only=settings["attn_only"],
        eps=settings.get("ln_eps", 1e-5),
        final_rms=settings.get("final_rms", False),
        normalization_type=normalization(settings),
        positional_embedding_type="standard",
        architecture="TransformerLensNative",
        init_weights=False,
    )
    try:
        bridge = boot(config, device=device, dtype=dtype, model_name=files.name)
    except ValueError as error:
        raise ConfigError(
            "TransformerBridge cannot compute this model", where=files.config, found=str(error)
        ) from error
    bridge.load_state_dict(convert_tl_checkpoint(dict(state), config), strict=True)
    return bridge.eval()


def _norm(settings: Mapping[str, Any], name: str, width: int) -> dict[str, Shape]:
    kind = normalization(settings)
    return {f"{name}.{part}": (width,) for part in {"LN": "wb", "RMS": "w"}.get(kind or "", "")}


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file) if file.suffix == ".safetensors" else load_pt(file)
    except SafetensorError as error:
        raise InputError(
            "the weights do not read", where=file, found=str(error).partition("\n")[0],
            expected="tensors by name, as safetensors",
        ) from error  # fmt: skip
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError("the file holds other things than tensors by name", where=file)
    return found


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Shape], where: Path) -> None:
    """Raises ``InputError``, naming the first few tensors that are missing, too many, or of another shape."""
    wrong = [f"no {name}" for name in expected if name not in state]
    wrong += [f"{name}, which it has not" for name in state if name not in expected]
    wrong += [
        f"{name} of shape {tuple(state[name].shape)} and not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(
            "the weights are not those of the model's config.json", where=where,
            found="; ".join(wrong[:_SHOWN]) + more, expected=f"{len(expected)} tensors, of the shapes that it implies",
            remedy="restore both files from one commit of the model",
        )  # fmt: skip
