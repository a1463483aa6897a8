"""State <-> named tensors plus JSON: nothing is pickled, and this package writes no files.

Tensors carry the field's names and orientations (``W_enc`` (d_in, d_sae)); ``adam.first.*`` and ``adam.second.*`` are
Adam's moments. Everything returned is an independent contiguous copy, so that it may be written while training goes on.
Random generators have no state to save: they are derived from (seed, purpose, step).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .config import TrainerConfig
from .errors import StateMismatch
from .kernels.interface import Moments, Weights
from .metrics import DensityWindow
from .resampling import ResamplingState

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
T = TypeVar("T")

STATE_VERSION = 0


@dataclass
class TrainingState:
    """Everything that the next step depends on, besides the configuration and the batch.

    Attributes:
        weights: feature-major.
        moments: Adam's.
        mean: (d_in,) the dataset mean that explained variance is measured against.
        encoder_basis: None, or (k, d_in) directions that the encoder avoids.
        resampling: counts and candidates.
        window: firing counts since the current density window opened.
        completed: the last complete density window, or None.
        step: steps taken.
        rows_seen: rows trained on.
        last_l0: mean L0 of the last step, or of the starting sample: chooses the next step's engine.
    """

    weights: Weights
    moments: Moments
    mean: Tensor
    encoder_basis: Tensor | None
    resampling: ResamplingState
    window: DensityWindow
    completed: DensityWindow | None
    step: int
    rows_seen: int
    last_l0: float


def autoencoder_of(weights: Weights, config: TrainerConfig) -> Autoencoder:
    """An independent copy of the weights as an autoencoder."""
    enc, b_enc, dec, b_dec = (tensor.detach().clone() for tensor in weights)
    return Autoencoder(enc.T, b_enc, dec, b_dec, subtract_b_dec=config.subtract_b_dec)


def autoencoder_tensors(sae: Autoencoder) -> dict[str, Tensor]:
    """The four named tensors of an autoencoder, contiguous."""
    named = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return {name: tensor.detach().contiguous().clone() for name, tensor in named.items()}


def autoencoder_json(sae: Autoencoder) -> dict[str, Json]:
    """What the tensors leave open."""
    return {"activation": "relu", "d_in": sae.d_in, "d_sae": sae.d_sae, "subtract_b_dec": sae.subtract_b_dec}


def autoencoder_from(tensors: Mapping[str, Tensor], json: Mapping[str, Json]) -> Autoencoder:
    """The inverse of ``autoencoder_tensors`` and ``autoencoder_json``.

    Raises:
        StateMismatch: a tensor is missing, or the activation function is not known here.
        InvalidTensor: shapes disagree.
    """
    if json.get("activation", "relu") != "relu":
        raise StateMismatch("activation", found=json["activation"], expected="relu")
    W_enc, b_enc, W_dec, b_dec = (_take(tensors, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return Autoencoder(W_enc, b_enc, W_dec, b_dec, subtract_b_dec=bool(json.get("subtract_b_dec", True)))


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Every tensor of the state under its name."""
    tensors = {
        **_named("", state.weights),
        **_named("adam.first.", state.moments.first),
        **_named("adam.second.", state.moments.second),
        "dataset_mean": state.mean,
        "resampling.counts": state.resampling.counts,
        "density.counts": state.window.counts,
    }
    optional = {
        "encoder_basis": state.encoder_basis,
        "resampling.candidates": state.resampling.candidates,
        "density.completed_counts": None if state.completed is None else state.completed.counts,
    }
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def state_json(state: TrainingState, config: TrainerConfig) -> dict[str, Json]:
    """Every scalar of the state, and the configuration it belongs to."""
    return {
        "version": STATE_VERSION,
        "config": config.model_dump(mode="json"),
        "step": state.step,
        "rows_seen": state.rows_seen,
        "last_l0": state.last_l0,
        "resampling_rows": state.resampling.rows,
        "resampling_weight": state.resampling.weight,
        "density_rows": state.window.rows,
        "density_completed_rows": 0 if state.completed is None else state.completed.rows,
    }


def state_from(config: TrainerConfig, tensors: Mapping[str, Tensor], json: Mapping[str, Json]) -> TrainingState:
    """The inverse of ``state_tensors`` and ``state_json``.

    Raises:
        StateMismatch: something is missing, of the wrong shape, or belongs to another configuration.
    """
    if json.get("version") != STATE_VERSION:
        raise StateMismatch("version", found=json.get("version"), expected=STATE_VERSION)
    if json.get("config") != config.model_dump(mode="json"):
        raise StateMismatch("config", found=json.get("config"), expected=config.model_dump(mode="json"))
    weights = _weights("", tensors, config)
    completed_rows = _scalar(json, "density_completed_rows", int)
    completed = (
        DensityWindow(_take(tensors, "density.completed_counts").clone(), completed_rows, complete=True)
        if completed_rows
        else None
    )
    return TrainingState(
        weights=weights,
        moments=Moments(_weights("adam.first.", tensors, config), _weights("adam.second.", tensors, config)),
        mean=_take(tensors, "dataset_mean").clone(),
        encoder_basis=_optional(tensors, "encoder_basis"),
        resampling=ResamplingState(
            counts=_take(tensors, "resampling.counts").clone(),
            rows=_scalar(json, "resampling_rows", int),
            candidates=_optional(tensors, "resampling.candidates"),
            weight=_scalar(json, "resampling_weight", float),
        ),
        window=DensityWindow(
            _take(tensors, "density.counts").clone(), _scalar(json, "density_rows", int), complete=False
        ),
        completed=completed,
        step=_scalar(json, "step", int),
        rows_seen=_scalar(json, "rows_seen", int),
        last_l0=_scalar(json, "last_l0", float),
    )


def _named(prefix: str, weights: Weights) -> dict[str, Tensor]:
    named = {"W_enc": weights.enc.T, "b_enc": weights.b_enc, "W_dec": weights.dec, "b_dec": weights.b_dec}
    return {prefix + name: tensor for name, tensor in named.items()}


def _weights(prefix: str, tensors: Mapping[str, Tensor], config: TrainerConfig) -> Weights:
    W_enc, b_enc, W_dec, b_dec = (_take(tensors, prefix + name) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    d_in = b_dec.numel()
    for name, tensor, shape in (
        ("W_enc", W_enc, (d_in, config.d_sae)),
        ("b_enc", b_enc, (config.d_sae,)),
        ("W_dec", W_dec, (config.d_sae, d_in)),
        ("b_dec", b_dec, (d_in,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise StateMismatch(prefix + name, found=found, expected=f"{shape} torch.float32")
    return Weights(W_enc.T.contiguous(), b_enc.clone(), W_dec.clone(), b_dec.clone())


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise StateMismatch(name, found="nothing", expected="a tensor")
    return tensors[name]


def _optional(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    return tensors[name].clone() if name in tensors else None


def _scalar(json: Mapping[str, Json], name: str, kind: type[T]) -> T:
    value = json.get(name)
    if not isinstance(value, kind):
        raise StateMismatch(name, found=value, expected=kind.__name__)
    return value
