"""A training step beside the fastest plain PyTorch loop, over the whole range of L0: ``python -m bench.train``.

Contenders take the same batches from the same starting weights: the dense loop (autograd, torch's fused Adam, gradient
projected, rows renormalised) in float32, the same under bfloat16 autocast, both again under ``torch.compile`` where a
C++ compiler is there, and sparsemill's trainer as it chooses its engine by L0. Biases are calibrated so that the batch
has the L0 named; the learning rate is so small that it stays there. A figure is the median of rounds taken in turn.
Activations are GELU of normal numbers with a spectrum, of the width named. Writes ``bench/results/train.json``; with
``--device cuda``, where nothing has run yet, ``train-<device>.json``, and the float32 screen, the CPU's, is left out.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.machine import interleave, say, write_results
from bench.tables import markdown
from sae.config import TrainerConfig
from sae.kernels.sparse_cpu import SparseEngine
from sae.trainer import Trainer

SIZES = ((512, 4096), (2048, 16384))
L0S = (10, 20, 60, 200, 500, 1000, 2000, 4000)
BATCH_ROWS = 4096
LEARNING_RATE = 1e-7
PLAIN, AUTOCAST = "dense float32", "dense bfloat16 autocast"
OURS, FALLBACK = "sparsemill", "sparsemill, float32 screen"


class DenseLoop:
    """The recipe as one would write it in plain PyTorch."""

    def __init__(self, start: Trainer, l1_coeff: float, *, autocast: bool, compiled: bool) -> None:
        sae = start.autoencoder
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(tensor.clone().contiguous()) for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        )
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self._adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        self._l1_coeff, self._autocast, self._device = l1_coeff, autocast, sae.W_enc.device.type
        self._loss: Callable[[Tensor], Tensor] = torch.compile(self._plain_loss) if compiled else self._plain_loss

    def _plain_loss(self, x: Tensor) -> Tensor:
        acts = F.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        error = acts @ self.W_dec + self.b_dec - x
        return error.float().square().sum(dim=1).mean() + self._l1_coeff * acts.float().sum(dim=1).mean()

    def step(self, x: Tensor) -> None:
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._autocast):
            loss = self._loss(x)
        self._adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert self.W_dec.grad is not None
            unit = F.normalize(self.W_dec, dim=1)
            self.W_dec.grad -= (self.W_dec.grad * unit).sum(dim=1, keepdim=True) * unit
            self._adam.step()
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))


def activations(rows: int, width: int) -> Tensor:
    """GELU of normal numbers whose directions have falling variance, float32 (rows, width)."""
    random = torch.Generator().manual_seed(0)
    spectrum = (1 + torch.arange(width) / 16).rsqrt()
    mixing = torch.linalg.qr(torch.randn(width, width, generator=random)).Q * spectrum[:, None]
    return F.gelu(2 * torch.randn(rows, width, generator=random) @ mixing)


def config(d_sae: int, l0: float, engine: str) -> TrainerConfig:
    return TrainerConfig(
        d_sae=d_sae, l1_coeff=0.5, steps=10**6, batch_rows=BATCH_ROWS, learning_rate=LEARNING_RATE, init="tied",
        b_dec_init="mean", b_enc_init="calibrated", target_l0=l0, engine=engine, density_window_rows=10**9,
    )  # fmt: skip


def measure(
    width: int, d_sae: int, l0: float, names: list[str], *, rounds: int, threads: int, device: str
) -> dict[str, Any]:
    """Seconds a step of some contenders at one L0."""
    rows = activations(BATCH_ROWS, width).to(device)
    synchronize = torch.cuda.synchronize if rows.is_cuda else lambda: None

    def whole(step: Callable[[Tensor], object]) -> Callable[[], None]:
        def work() -> None:
            step(rows)
            synchronize()

        return work

    def start(engine: str) -> Trainer:
        return Trainer.start(config(d_sae, l0, engine), width, rows, rows.mean(dim=0), threads=threads)

    ours = start("auto")
    contenders: dict[str, Callable[[], object]] = {}
    for name in names:
        if name.startswith("sparsemill"):
            trainer = ours if name == OURS else start("sparse")
            if name == FALLBACK:
                trainer._sparse = SparseEngine(threads=threads, bfloat16=False)  # noqa: SLF001 - no setting for it
            contenders[name] = whole(trainer.step)
        else:
            loop = DenseLoop(ours, 0.5, autocast=AUTOCAST in name, compiled="compiled" in name)
            contenders[name] = whole(loop.step)
    for step in contenders.values():
        step()  # compiles, loads what is cached, allocates
    timed = interleave(contenders, rounds)
    metrics = ours.step(rows)
    found = {name: timed.runs[name].rates(1) for name in names}
    seconds = {
        name: {"median": 1 / rate["median"], "low": 1 / rate["high"], "high": 1 / rate["low"]}
        for name, rate in found.items()
    }
    return {"l0": metrics.l0, "engine": metrics.engine, "seconds": seconds, "load": timed.load} | {
        "ratios": {name: timed.ratio(OURS, name) for name in names if name != OURS}
    }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of docs/training.md."""
    blocks: dict[str, str] = {}
    for size, found in figures["sizes"].items():
        reference = found["reference"]
        rows = [
            [
                f"{point['l0']:.0f}", point["engine"], f"{point['seconds'][OURS]['median']:.3f}",
                f"{point['seconds'][reference]['median']:.3f}", f"{point['ratios'][reference]:.1f} x",
                f"{point['ratios'][AUTOCAST]:.1f} x",
            ]
            for point in found["curve"]
        ]  # fmt: skip
        header = ["L0", "engine taken", "step, s", "dense float32, s", "against it", "against bfloat16 autocast"]
        blocks[f"curve-{size}"] = markdown(header, rows)
        contenders = [
            [name, f"{s['median']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}"]
            for name, s in found["at_60"]["seconds"].items()
        ]
        blocks[f"contenders-{size}"] = markdown(["at L0 60", "step, s", "least to greatest"], contenders)
    ratios = [_ratios(size, found) for size, found in figures["sizes"].items()]
    header = ["at L0 60", "against float32", "against bfloat16 autocast", "float32 screen, against float32"]
    blocks["ratios"] = markdown(header[: len(ratios[0])], ratios)
    machine = figures["machine"]
    measured = [point for found in figures["sizes"].values() for point in (found["at_60"], *found["curve"])]
    loads = [load for point in measured for load in point["load"]]
    where = figures.get("device", f"{machine['cpu']}, {figures['threads']} threads")
    blocks["machine"] = (
        f"{where}, torch {machine['versions']['torch']}; batch {BATCH_ROWS}. "
        f"Medians of {figures['rounds']} rounds; load average {min(loads):.1f} to {max(loads):.1f}."
    )
    return blocks


def _ratios(size: str, found: Mapping[str, Any]) -> list[str]:
    """How many times as fast the sparse step is as the fastest dense loop of either kind."""
    ratios = found["at_60"]["ratios"]
    against_autocast = min(ratio for name, ratio in ratios.items() if AUTOCAST in name)
    reference = ratios[found["reference"]]
    d_in, d_sae = map(int, size.split("-"))
    speeds = [reference, against_autocast]
    if FALLBACK in ratios:  # the CPU's
        speeds.append(reference / ratios[FALLBACK])
    return [f"{d_in:,} -> {d_sae:,}", *(f"{speed:.1f} x" for speed in speeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="a torch device")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings: Any = vars(arguments)  # rounds, threads, device
    ours = [OURS, FALLBACK] if arguments.device == "cpu" else [OURS]
    dense = [PLAIN, AUTOCAST]
    if shutil.which("g++") or shutil.which("clang++"):
        dense += [f"{name}, compiled" for name in dense]
    sizes: dict[str, Any] = {}
    for width, d_sae in SIZES:
        say(f"{width} -> {d_sae}: all contenders at L0 60")
        at_60 = measure(width, d_sae, 60, [*dense, *ours], **settings)
        full_precision = [name for name in dense if AUTOCAST not in name]
        reference = min(full_precision, key=lambda name: at_60["seconds"][name]["median"])
        curve: list[dict[str, Any]] = []
        for l0 in (l0 for l0 in L0S if l0 < d_sae / 2):
            say(f"{width} -> {d_sae}: L0 {l0}")
            names = list(dict.fromkeys([reference, AUTOCAST, OURS]))
            curve.append(measure(width, d_sae, l0, names, **settings))
        sizes[f"{width}-{d_sae}"] = {"reference": reference, "at_60": at_60, "curve": curve}
    figures = {"threads": arguments.threads, "rounds": arguments.rounds, "seed": 0, "sizes": sizes}
    if arguments.device == "cpu":
        write_results("train", figures)
    else:
        device = torch.cuda.get_device_name(arguments.device)
        write_results(f"train-{'-'.join(device.lower().split())}", {"device": device, **figures})


if __name__ == "__main__":
    main()
