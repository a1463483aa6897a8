"""The autoencoder as a value: four tensors and what they compute.

    sae_in = x - b_dec;  feature_acts = ReLU(sae_in @ W_enc + b_enc);  sae_out = feature_acts @ W_dec + b_dec

A frozen value rather than an ``nn.Module``: training keeps its own feature-major copy of the weights, so there is
nothing for a module to register, and a loaded autoencoder cannot be trained by accident.
Source: Towards Monosemanticity, appendix, autoencoder training; the post's code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InvalidTensor


class AutoencoderOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        hidden_pre: (..., d_sae) pre-activations.
        feature_acts: (..., d_sae) their ReLU.
        sae_out: (..., d_in) the reconstruction.
    """

    hidden_pre: Tensor
    feature_acts: Tensor
    sae_out: Tensor


@dataclass(frozen=True)
class Autoencoder:
    """A sparse autoencoder; its tensors are float32 where nothing else is said.

    Attributes:
        W_enc: (d_in, d_sae) encoder; feature i reads direction ``W_enc[:, i]``.
        b_enc: (d_sae,) encoder bias.
        W_dec: (d_sae, d_in) decoder; feature i writes direction ``W_dec[i]``.
        b_dec: (d_in,) decoder bias.
        subtract_b_dec: whether b_dec is subtracted from the input.

    Raises:
        InvalidTensor: the shapes do not belong together.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    subtract_b_dec: bool = True

    def __post_init__(self) -> None:
        """Checks that the four shapes agree."""
        if self.W_enc.ndim != 2:
            raise InvalidTensor("W_enc", found=tuple(self.W_enc.shape), expected="(d_in, d_sae)")
        d_in, d_sae = self.W_enc.shape
        for name, expected in (("b_enc", (d_sae,)), ("W_dec", (d_sae, d_in)), ("b_dec", (d_in,))):
            found = tuple(getattr(self, name).shape)
            if found != expected:
                raise InvalidTensor(name, found=found, expected=f"{expected} beside W_enc {(d_in, d_sae)}")

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Maps activations (..., d_in) to hidden_pre (..., d_sae)."""
        sae_in = x - self.b_dec if self.subtract_b_dec else x
        return sae_in @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Maps activations (..., d_in) to feature_acts (..., d_sae)."""
        return torch.relu(self.pre_activations(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Maps feature_acts (..., d_sae) to the reconstruction (..., d_in)."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """Encodes and decodes activations (..., d_in)."""
        hidden_pre = self.pre_activations(x)
        feature_acts = torch.relu(hidden_pre)
        return AutoencoderOutput(hidden_pre, feature_acts, self.decode(feature_acts))

    def __call__(self, x: Tensor) -> AutoencoderOutput:
        """The same as ``forward``."""
        return self.forward(x)

    def to(self, target: torch.device | torch.dtype | str) -> "Autoencoder":
        """A copy on another device or in another precision."""
        moved = (tensor.to(target) for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        return Autoencoder(*moved, subtract_b_dec=self.subtract_b_dec)
