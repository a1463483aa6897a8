# ruff: noqa: N818  (names say what is wrong; "Error" at the end of each would add nothing)
"""What can go wrong inside the autoencoder package; callers map these onto their own tree by ``kind``."""

from typing import ClassVar


class SaeError(Exception):
    """Root of this package's errors; ``kind`` is stable across versions."""

    kind: ClassVar[str] = "sae"


class InvalidTensor(SaeError):
    """A tensor's shape, type or values are not what was documented."""

    kind: ClassVar[str] = "input"

    def __init__(self, name: str, *, found: object, expected: object) -> None:
        self.name, self.found, self.expected = name, found, expected
        super().__init__(f"{name}: found {found}, expected {expected}")


class StateMismatch(SaeError):
    """A saved state does not belong to this configuration, or is incomplete."""

    kind: ClassVar[str] = "corrupt"

    def __init__(self, name: str, *, found: object, expected: object) -> None:
        self.name, self.found, self.expected = name, found, expected
        super().__init__(f"saved training state, {name}: found {found}, expected {expected}")


class TrainingDiverged(SaeError):
    """The loss is not finite; the weights are still those before the step."""

    kind: ClassVar[str] = "diverged"

    def __init__(self, step: int, *, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"training step {step}: loss is {loss}, expected a finite number; "
            "look for non-finite rows in the batch, or lower learning_rate"
        )
