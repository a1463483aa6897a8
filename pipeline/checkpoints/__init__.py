"""Autoencoders of other programs: read into ours, and ours written as theirs. Nothing is ever unpickled."""

from pipeline.checkpoints.formats import FORMATS, read_checkpoint, write_checkpoint
from pipeline.checkpoints.values import Checkpoint, Provenance

__all__ = ["FORMATS", "Checkpoint", "Provenance", "read_checkpoint", "write_checkpoint"]
