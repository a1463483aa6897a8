"""One loader for every language model, and the two passes the stages need: up to a hook, and with edits to the end.

A model comes in one of three ways, all ending in a TransformerLens ``TransformerBridge``:

- ``demo``: the model this package ships (``pipeline/assets/demo-model``);
- a folder, or a Hub repository of TransformerLens's own family (``gelu-1l``, ``NeelNanda/GELU_1L512W_C4_Code``...), in
  that family's layout: ``config.json``, weights under TransformerLens's property names, a tokenizer. The demo model is
  such a folder, so it takes the very path gelu-1l takes;
- any other name: ``TransformerBridge.boot_transformers``.

Weights are taken as they are: W_out is not centred and layer norms are not folded, in the harvest and in the analyses.
A pass to hooks ends at the last of them (``pipeline.forward``; through the bridge, by an exception raised inside the
hook: on a 1-layer model ``stop_at_layer`` does not stop before the unembedding, which would cost several times the
rest).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from pipeline.forward import FastForward
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError, UnknownHook
from storage.fingerprint import sha256_file

Edit = Callable[[torch.Tensor], torch.Tensor]

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo-model"
_HUB_NAMES = {
    "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code",
    "gelu-2l": "NeelNanda/GELU_2L512W_C4_Code",
    "gelu-3l": "NeelNanda/GELU_3L512W_C4_Code",
    "gelu-4l": "NeelNanda/GELU_4L512W_C4_Code",
}
BOS_NAMES = ("<|BOS|>", "<s>", "<bos>", "<|endoftext|>")
EOS_NAMES = ("<|EOS|>", "</s>", "<eos>", "<|endoftext|>")


class _LastHookReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass at the last of the hooks asked for."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model in TransformerLens's own layout lies.

    Attributes:
        config: ``config.json``.
        weights: ``.safetensors``, or ``.pth`` (read with ``weights_only=True``).
        tokenizer: ``tokenizer.json``.
    """

    config: Path
    weights: Path
    tokenizer: Path

    @property
    def identity(self) -> dict[str, str]:
        """Sha256 of each file: a moved repository is a different model."""
        return {
            "config_sha256": sha256_file(self.config),
            "weights_sha256": sha256_file(self.weights),
            "tokenizer_sha256": sha256_file(self.tokenizer),
        }


class LanguageModel:
    """A TransformerBridge with its tokenizer and identity.

    Attributes:
        name: as it was asked for.
        identity: the hashes that name its content.
        bridge: the TransformerLens model, in eval mode.
        tokenizer: a ``tokenizers.Tokenizer``.

    Where there is a ``FastForward`` of the model, activations at the hooks that it knows come from it.
    """

    def __init__(
        self,
        name: str,
        bridge: Any,
        tokenizer: Tokenizer,
        identity: Mapping[str, str],
        forward: FastForward | None = None,
    ):
        self._forward = forward
        self.name = name
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.identity = dict(identity)

    @property
    def n_ctx(self) -> int:
        """Positions the model was trained with."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self.bridge.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.bridge.parameters()).device

    @property
    def hook_names(self) -> list[str]:
        """Every hook of the model."""
        return sorted(self.bridge.hook_dict)

    @property
    def W_U(self) -> torch.Tensor:
        """Unembedding, (d_model, d_vocab)."""
        return self.bridge.W_U.detach()

    def W_out(self, layer: int) -> torch.Tensor:
        """Output weights of a layer's MLP, (d_mlp, d_model), as the harvest used them (not centred)."""
        return self.bridge.W_out[layer].detach()

    @cached_property
    def bos_id(self) -> int:
        """Id of the token that begins a prompt."""
        return special_token_id(self.tokenizer, BOS_NAMES)

    @cached_property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return special_token_id(self.tokenizer, EOS_NAMES)

    def token_strings(self) -> list[str]:
        """Text of every token id, (d_vocab,); bytes that are no UTF-8 of their own show as the replacement sign."""
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in range(self.d_vocab)]

    def check_hook(self, hook_name: str) -> None:
        """Raises ``UnknownHook``, naming the hooks that exist, if the model has none of this name."""
        if hook_name in self.bridge.hook_dict:
            return
        near = get_close_matches(hook_name, self.hook_names, n=3, cutoff=0.4)
        sites = [name for name in self.hook_names if name.endswith(("hook_post", "hook_mlp_out", "hook_resid_post"))]
        raise UnknownHook(
            f"model {self.name} has no hook of this name",
            found=hook_name,
            expected=", ".join(near + [name for name in sites if name not in near]),
            remedy="choose one of these, or list all with 'sparsemill hooks MODEL'",
        )

    def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        """Activations at one hook; nothing after it is computed.

        Args:
            tokens: int64 (n, T).
            hook_name: such as ``blocks.0.mlp.hook_post``.

        Returns:
            float tensor (n, T, d).
        """
        return self.activations_at(tokens, [hook_name])[hook_name]

    @torch.inference_mode()
    def activations_at(self, tokens: torch.Tensor, hook_names: Collection[str]) -> dict[str, torch.Tensor]:
        """Activations at several hooks in one pass; nothing after the last of them is computed.

        Args:
            tokens: int64 (n, T).
            hook_names: of the hooks.

        Returns:
            float tensor (n, T, d) a hook, of the same bits whatever other hooks are asked for.
        """
        tokens = tokens.to(self.device)
        known = frozenset[str]() if self._forward is None else self._forward.sites.intersection(hook_names)
        found = {} if self._forward is None or not known else self._forward(tokens, known)
        others = [name for name in hook_names if name not in known]
        return found | (self._by_hooks(tokens, others) if others else {})

    def _by_hooks(self, tokens: torch.Tensor, hook_names: Collection[str]) -> dict[str, torch.Tensor]:
        reached: dict[str, torch.Tensor] = {}

        def keep(name: str, activation: torch.Tensor, hook: Any) -> None:  # noqa: ARG001 - passed by keyword
            reached[name] = activation
            if len(reached) == len(hook_names):
                raise _LastHookReached

        hooks = [(name, partial(keep, name)) for name in hook_names]
        try:
            self.bridge.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks)
        except _LastHookReached:
            return reached
        missed = sorted(set(hook_names) - set(reached))
        raise UnknownHook("the forward pass ended without reaching these hooks", found=", ".join(missed))

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None) -> torch.Tensor:
        """Next-token logits, with activations replaced on the way.

        Args:
            tokens: int64 (n, T).
            edits: for each hook name a function from the activation (n, T, d) to its replacement.

        Returns:
            float tensor (n, T, d_vocab).
        """
        hooks = [(name, _as_hook(edit)) for name, edit in (edits or {}).items()]
        return self.bridge.run_with_hooks(tokens.to(self.device), return_type="logits", fwd_hooks=hooks)


def load(name: str, *, device: str = "cpu") -> LanguageModel:
    """Loads a language model with its tokenizer.

    Args:
        name: ``demo``, a folder, a TransformerLens name such as ``gelu-1l``, or any model TransformerBridge boots.
        device: a torch device.

    Raises:
        ConfigError: no such model.
    """
    files = find_files(name)
    if files is None:
        return _boot_transformers(name, device)
    settings, state = _read_property_format(files, device)
    forward = FastForward(settings, state) if FastForward.knows(settings) else None
    bridge = _boot_property_format(settings, state, device, name)
    return LanguageModel(name, bridge, load_tokenizer(files.tokenizer), files.identity, forward)


def load_recorded(activations: Artifact, *, device: str = "cpu") -> LanguageModel:
    """Loads the model that an activations artifact was harvested from, and checks that it still is that model.

    Raises:
        ConfigError: a model of that name has other weights now.
    """
    model = load(str(activations.stats["language_model"]), device=device)
    if model.identity != activations.config["model"]:
        raise ConfigError(
            f"model {model.name} is not the one that was harvested", where=activations.id,
            found=model.identity, expected=activations.config["model"],
            remedy="restore that model's files, or harvest again",
        )  # fmt: skip
    return model


def identity(name: str) -> dict[str, str]:
    """Hashes that name a model's content, without loading it where its files can be found."""
    files = find_files(name)
    return files.identity if files is not None else load(name).identity


def find_files(name: str) -> ModelFiles | None:
    """Files of a model in TransformerLens's own layout, or None where the name is not of that family."""
    if name == "demo":
        return _files_in(DEMO_FOLDER)
    folder = Path(name)
    if folder.is_dir() and (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        return _files_in(folder) if "d_mlp" in config and "model_type" not in config else None
    repository = _HUB_NAMES.get(name, name)
    if repository.startswith("NeelNanda/"):
        return _files_on_hub(repository)
    return None


def special_token_id(tokenizer: Tokenizer, names: tuple[str, ...]) -> int:
    """Id of the first of these tokens that the vocabulary has."""
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise InputError("the tokenizer has none of the special tokens expected", expected=" or ".join(names))


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError("not a tokenizer file", where=file, found=str(error)) from error


def _as_hook(edit: Edit) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    return lambda activation, hook: edit(activation)  # noqa: ARG005 - TransformerLens passes hook by keyword


def _files_in(folder: Path) -> ModelFiles:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*final.pth"))
    if not weights:
        raise ConfigError("no weights in the model's folder", where=folder, expected="*.safetensors or *final.pth")
    return ModelFiles(folder / "config.json", weights[0], folder / "tokenizer.json")


def _files_on_hub(repository: str) -> ModelFiles:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(repository: str, name: str) -> Path:
        try:
            return Path(hf_hub_download(repository, name))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(
                f"model file {name} is not to be had",
                where=f"hub repository {repository}",
                found=f"{type(error).__name__}",
                remedy="check the name and the network, or fill the Hub cache and set HF_HUB_OFFLINE=1",
            ) from error

    config = download(repository, "config.json")
    tokenizer_name = json.loads(config.read_text()).get("tokenizer_name") or repository
    return ModelFiles(config, download(repository, "model_final.pth"), download(tokenizer_name, "tokenizer.json"))


def _read_property_format(files: ModelFiles, device: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    if files.weights.suffix == ".safetensors":
        state = load_file(files.weights, device=device)
    else:
        state = torch.load(files.weights, map_location=device, weights_only=True)
    return json.loads(files.config.read_text()), {key: tensor.float() for key, tensor in state.items()}


def _boot_property_format(settings: Mapping[str, Any], state: dict[str, torch.Tensor], device: str, name: str) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    config = TransformerBridgeConfig(
        d_model=settings["d_model"],
        n_layers=settings["n_layers"],
        d_mlp=settings["d_mlp"],
        d_head=settings["d_head"],
        n_heads=settings["n_heads"],
        n_ctx=settings["n_ctx"],
        d_vocab=settings["d_vocab"],
        act_fn=settings["act_fn"],
        attn_only=settings["attn_only"],
        eps=settings.get("ln_eps", 1e-5),
        normalization_type=settings.get("normalization", settings.get("normalization_type")),
        positional_embedding_type="standard",
        architecture="TransformerLensNative",
        init_weights=False,
    )
    bridge = boot(config, device=device, model_name=name)
    converted = convert_tl_checkpoint(state, config)
    converted.setdefault("unembed.bias", torch.zeros(config.d_vocab, device=device))
    bridge.load_state_dict(converted, strict=True)
    return bridge.eval()


def _boot_transformers(name: str, device: str) -> LanguageModel:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(name, device=device)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "no language model of this name",
            found=name,
            expected=f"demo, a folder, one of {', '.join(_HUB_NAMES)}, or a name TransformerLens knows",
            remedy="check the name; offline, the Hub cache must hold the model",
        ) from error
    tokenizer = bridge.tokenizer.backend_tokenizer
    weights = hashlib.sha256()
    for key, tensor in sorted(bridge.original_model.state_dict().items()):
        weights.update(key.encode())
        weights.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    identity = {
        "weights_sha256": weights.hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    return LanguageModel(name, bridge.eval(), tokenizer, identity)
