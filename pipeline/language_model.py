"""One loader for every language model, and the passes that stages need: up to a hook, with edits to the end, and back.

A model is the shipped one (``demo``), a folder, or a Hub repository (``pipeline.model_files``), in TransformerLens's
own layout (``pipeline.property_format``: gelu-1l, solu-1l and their kin; the demo model too, so it takes the very path
that gelu-1l takes) or in Hugging Face's (``pipeline.transformers_format``: GPT-2, Pythia and what else
TransformerBridge knows). Either ends in a ``TransformerBridge`` and, where the architecture has one, a ``FastForward``.

Weights are taken as they are: W_out is not centred and layer norms are not folded, in the harvest and in the analyses.
A pass to hooks ends at the last of them (``pipeline.forward``; through the bridge, by an exception raised inside the
hook: on a 1-layer model ``stop_at_layer`` does not stop before the unembedding, which would cost several times the
rest). A bridge keeps the hooks of the pass that it is in, so its passes take turns; fast ones may run side by side.
"""

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import cached_property, partial
from threading import Lock
from typing import Any, Literal, TypeAlias, cast

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from pipeline.forward import FastForward
from pipeline.model_files import ModelFiles, find_files
from pipeline.property_format import boot_properties, read_properties
from pipeline.transformers_format import boot_transformers
from pipeline.workspace import facts
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError, UnknownHook

Edit = Callable[[torch.Tensor], torch.Tensor]
ForwardDtype: TypeAlias = Literal["float32", "bfloat16"]

BOS_NAMES = ("<|BOS|>", "<s>", "<bos>", "<|endoftext|>")
EOS_NAMES = ("<|EOS|>", "</s>", "<eos>", "<|endoftext|>")
_DTYPES: dict[ForwardDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _LastHookReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass at the last of the hooks asked for."""


class LanguageModel:
    """A TransformerBridge with its tokenizer and identity.

    Attributes:
        name: as it was asked for, without a revision.
        commit: of its Hub repository; None for a folder.
        identity: the hashes that name its content.
        bridge: the TransformerLens model, in eval mode.
        tokenizer: a ``tokenizers.Tokenizer``.

    Where there is a ``FastForward`` of the model, activations at the hooks that it knows come from it.
    """

    def __init__(self, files: ModelFiles, bridge: Any, tokenizer: Tokenizer, forward: FastForward | None):
        self._forward = forward
        self._turn = Lock()
        self.name = files.name
        self.commit = files.commit
        self.identity = files.identity
        self.bridge = bridge
        self.tokenizer = tokenizer

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
        """Unembedding, float32 (d_model, d_vocab)."""
        return self.bridge.W_U.detach().float()

    def W_out(self, layer: int) -> torch.Tensor:
        """Output weights of a layer's MLP, float32 (d_mlp, d_model), as the harvest used them (not centred)."""
        return self.bridge.W_out[layer].detach().float()

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
            float32 tensor (n, T, d).
        """
        return self.activations_at(tokens, [hook_name])[hook_name]

    @torch.inference_mode()
    def activations_at(self, tokens: torch.Tensor, hook_names: Collection[str]) -> dict[str, torch.Tensor]:
        """Activations at several hooks in one pass; nothing after the last of them is computed.

        Args:
            tokens: int64 (n, T).
            hook_names: of the hooks.

        Returns:
            float32 tensor (n, T, d) a hook, of the same bits whatever other hooks are asked for.
        """
        tokens = tokens.to(self.device)
        known = frozenset[str]() if self._forward is None else self._forward.sites.intersection(hook_names)
        found = {} if self._forward is None or not known else self._forward(tokens, known)
        others = [name for name in hook_names if name not in known]
        found |= self._by_hooks(tokens, others) if others else {}
        return {name: activation.float() for name, activation in found.items()}

    def _by_hooks(self, tokens: torch.Tensor, hook_names: Collection[str]) -> dict[str, torch.Tensor]:
        reached: dict[str, torch.Tensor] = {}

        def keep(name: str, activation: torch.Tensor, hook: Any) -> None:  # noqa: ARG001 - passed by keyword
            reached[name] = activation
            if len(reached) == len(hook_names):
                raise _LastHookReached

        hooks = [(name, partial(keep, name)) for name in hook_names]
        try:
            with self._turn:
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
            edits: for each hook name a function from the activation, float32 (n, T, d), to its replacement.

        Returns:
            float32 tensor (n, T, d_vocab).
        """
        hooks = [(name, _as_hook(edit)) for name, edit in (edits or {}).items()]
        with self._turn:
            return self.bridge.run_with_hooks(tokens.to(self.device), return_type="logits", fwd_hooks=hooks).float()

    def loss_gradient(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        """Gradient of the next-token cross-entropy by the activations at a hook.

        Args:
            tokens: int64 (n, T).
            hook_name: such as ``blocks.0.mlp.hook_post``.

        Returns:
            float32 tensor (n, T, d): of the sum of a prompt's T - 1 losses, in nats per unit of activation.
        """
        tokens = tokens.to(self.device)
        reached: list[torch.Tensor] = []

        def watch(activation: torch.Tensor) -> torch.Tensor:
            reached.append(activation.detach().requires_grad_())
            return reached[0]

        with self._turn, torch.enable_grad():
            logits = self.bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(hook_name, _as_hook(watch))])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, reached)
        return gradient


def load(
    name: str, revision: str | None = None, *, device: str = "cpu", dtype: ForwardDtype = "float32"
) -> LanguageModel:
    """Loads a language model with its tokenizer.

    Args:
        name: ``demo``, a folder, a short name such as ``gelu-1l``, or a Hub repository; of the last two also
            ``name@revision``.
        revision: a branch, tag or commit of the repository.
        device: a torch device.
        dtype: of its weights and activations; what a ``LanguageModel`` returns is float32 either way.

    Raises:
        ConfigError: no such model, one of its files is missing, or it is one that cannot be computed.
        InputError: a file does not read, or its tensors are not those that ``config.json`` implies.
    """
    files = find_files(name, revision)
    tokenizer = files.read_tokenizer()
    if files.layout == "properties":
        state = {name: tensor.to(device, _DTYPES[dtype]) for name, tensor in read_properties(files).items()}
        settings, bridge = files.settings, boot_properties(files, state, device, _DTYPES[dtype])
    else:
        bridge, properties = boot_transformers(files, tokenizer, device, _DTYPES[dtype])
        settings, state = properties or ({}, {})
    forward = FastForward(settings, state) if settings and FastForward.knows(settings) else None
    return LanguageModel(files, bridge, tokenizer, forward)


def load_recorded(recorded: Artifact, *, device: str = "cpu") -> LanguageModel:
    """Loads the model that an artifact was made with, as it was run then, and checks that it still is that model.

    Raises:
        ConfigError: a model of that name has other weights now.
    """
    dtype = cast("ForwardDtype", recorded.config.get("forward_dtype", "float32"))
    model = load(recorded_name(recorded), device=device, dtype=dtype)
    if model.identity != recorded.config["model"]:
        raise ConfigError(
            f"model {model.name} is not the one that was harvested", where=recorded.id,
            found=model.identity, expected=recorded.config["model"],
            remedy="restore that model's files, or harvest again",
        )  # fmt: skip
    return model


def recorded_name(recorded: Artifact) -> str:
    """The name by which an artifact's model is loaded: at the commit that it was made with, where it has one."""
    commit = recorded.stats.get("language_model_commit")
    return facts(recorded)["language_model"] + (f"@{commit}" if commit else "")


def identity(name: str) -> dict[str, str]:
    """Hashes that name a model's content, without loading it."""
    return find_files(name).identity


def special_token_id(tokenizer: Tokenizer, names: tuple[str, ...]) -> int:
    """Id of the first of these tokens that the vocabulary has."""
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise InputError("the tokenizer has none of the special tokens expected", expected=" or ".join(names))


def _as_hook(edit: Edit) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001 - TransformerLens passes it by keyword
        return edit(activation.float()).to(activation.dtype)

    return hook
