"""Torch's own files of tensors, read without running anything that is in them."""

import warnings
from pathlib import Path

import torch

from storage.errors import InputError


def load_pt(path: Path) -> object:
    """What a ``.pt`` or ``.pth`` file holds; one that holds more than tensors and containers is refused unread.

    Raises:
        InputError: the file is damaged, or would run code on reading.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickles, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's parser promises no kind of error for bytes that are none of its own
        raise InputError(
            "the weights do not read", where=path,
            found=str(error).strip().partition("\n")[0][:200] or type(error).__name__,
            expected="tensors alone, by name; anything that would run code on reading is refused",
        ) from error  # fmt: skip
