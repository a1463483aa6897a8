"""Data-parallel training: ``torchrun --nproc-per-node W -m pipeline.cli train``.

Every rank runs the same command. Upstream stages need no more than the store's locks: one rank makes, the others wait
and reuse. Of a training, rank 0 leads: it alone holds the artifact's lock, writes checkpoints, evaluates and commits;
the others are told where it starts from, take every step with it on their share of the reader's lanes, and are told
how it ended. Messages are JSON and tensors, never pickles. A checkpoint does not say how many ranks wrote it.
"""

import atexit
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed

from sae.collective import Alone, Collective, Group

_PATIENCE = timedelta(days=7)  # one rank may harvest for days while the others wait for its lock


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and what they say to each other.

    Attributes:
        collective: their sums.
    """

    collective: Collective

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.collective.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.collective.world == 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; asked by all at once."""
        if self.alone:
            return flag
        flags = torch.tensor([int(flag)])
        self.collective.sum_([flags])
        return bool(flags.item())

    def tell(self, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sends a message, and tensors by name, from rank 0 to all others."""
        if self.alone:
            return
        shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in (tensors or {}).items()}
        text = torch.frombuffer(bytearray(json.dumps([message, shapes]).encode()), dtype=torch.uint8)
        torch.distributed.broadcast(torch.tensor([len(text)]), 0)
        torch.distributed.broadcast(text, 0)
        for tensor in (tensors or {}).values():
            torch.distributed.broadcast(tensor.contiguous(), 0)

    def hear(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Receives what rank 0 tells."""
        length = torch.zeros(1, dtype=torch.int64)
        torch.distributed.broadcast(length, 0)
        text = torch.empty(int(length.item()), dtype=torch.uint8)
        torch.distributed.broadcast(text, 0)
        message, shapes = json.loads(text.numpy().tobytes())
        tensors: dict[str, torch.Tensor] = {}
        for name, (dtype, shape) in shapes.items():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            torch.distributed.broadcast(tensors[name], 0)
        return message, tensors


@cache
def ranks() -> Ranks:
    """The ranks of this process, joined on first use where torchrun started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(Alone())
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # messages stay on the CPU
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)  # its threads abort a process that just ends
    return Ranks(Group())


def own_device(name: str) -> torch.device:
    """The device that this rank trains on: of several on one machine, ``cuda`` means one each."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what nccl and the kernels take where nothing is said
    return device
