"""Harvesting, beside the bare forward pass: ``python -m bench.harvesting``.

A model of gelu-1l's shape with random weights (a pass costs the same whatever they are), prompts of 128 tokens, site
``blocks.0.mlp.hook_post`` (2048 wide), float16. In turn, round after round, in tokens a second:

- *run_with_cache*: TransformerLens's plain way, all hooks and the unembedding;
- *bridge to the hook*: the bridge's own pass, stopped at the hook;
- *hand-written*: embedding, layer norm, torch's scaled-dot-product attention, MLP; nothing else;
- *forward*: the product's pass, with torch's threads;
- *forward in workers*: the same, batches shared out over threads of one arithmetic thread each, as a harvest does;
- *harvest*: the stage itself, from its third window to its last: passes, encoding, shuffle, statistics, and beside them
  the window before being checksummed, hashed, written, fsynced and journalled. A long harvest is this. *Ends
  included*: from the first row to the last file, the first two windows in memory that the kernel still has to provide,
  the last one written with nothing beside it. (Loading the model, and the certificate, are in
  ``whole_stage_seconds``.)
- *device to host*, *disk*: a batch's encoded rows copied to the host; a window's files written and fsynced.

The harvest runs in a process of its own, which also tells its peak memory beside what ``pipeline.memory`` says that it
needs; a peak above that ends the benchmark with an error. Writes ``bench/results/harvesting-<device>.json``; ``python
-m bench.tables`` puts it into docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from bench.machine import Runs, interleave, say, write_results
from bench.tables import markdown
from pipeline import harvest as stage
from pipeline import language_model, tokens
from pipeline.config import Runtime, load_preset
from pipeline.memory import harvest_needs, resident_bytes
from pipeline.progress import Advance, Quiet
from pipeline.windows import single_threaded
from pipeline.workspace import Workspace, facts
from storage import atomic
from storage.shards import Layout, WindowBuffer

SHAPE = {"n_layers": 1, "d_model": 512, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48262}
SITE = "blocks.0.mlp.hook_post"
PROMPT_TOKENS, WINDOW_PROMPTS, BATCH = 128, 1024, 8
ENCODED = {"float16": 2, "uint8": 1}  # bytes a value
FORWARD_PROMPTS = 1024  # a pass of each forward


class Timed(Quiet):
    """Keeps the seconds from the first row of a harvest to its last file, and when how many rows were done."""

    seconds = 0.0

    def __init__(self) -> None:
        self.done: list[tuple[int, float]] = [(0, 0.0)]

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:  # noqa: ARG002
        began = time.perf_counter()

        def advance(done: int = 1, *, note: str = "") -> None:  # noqa: ARG001
            self.done.append((self.done[-1][0] + done, time.perf_counter() - began))

        yield advance
        self.seconds = time.perf_counter() - began

    def seconds_between(self, first: int, last: int) -> float:
        """From ``first`` rows done to ``last`` rows done."""
        at = dict(self.done)
        return at[last] - at[first]


def write_model(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    d, heads, width, d_mlp = SHAPE["d_model"], SHAPE["n_heads"], SHAPE["d_head"], SHAPE["d_mlp"]
    block = {f"attn.W_{name}": random(heads, d, width) for name in "QKV"}
    block |= {f"attn.b_{name}": random(heads, width) for name in "QKV"}
    block |= {"attn.W_O": random(heads, width, d), "attn.b_O": random(d)}
    block |= {"mlp.W_in": random(d, d_mlp), "mlp.b_in": random(d_mlp)}
    block |= {"mlp.W_out": random(d_mlp, d), "mlp.b_out": random(d)}
    block |= {f"{norm}.{name}": 1 + random(d) for norm in ("ln1", "ln2") for name in "wb"}
    weights = {f"blocks.0.{name}": tensor for name, tensor in block.items()}
    weights |= {"embed.W_E": random(SHAPE["d_vocab"], d), "pos_embed.W_pos": random(SHAPE["n_ctx"], d)}
    weights |= {"ln_final.w": 1 + random(d), "ln_final.b": random(d), "unembed.W_U": random(d, SHAPE["d_vocab"])}
    config = SHAPE | {"act_fn": "gelu", "attn_only": False, "normalization": "LN", "ln_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    vocabulary = {"<|BOS|>": 0, "<|EOS|>": 1} | {f"w{i}": i for i in range(2, SHAPE["d_vocab"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_preset(folder: Path, windows: int) -> Path:
    """A preset that harvests so many windows of random words."""
    words = np.random.default_rng(0).integers(2, SHAPE["d_vocab"], (windows + 2, WINDOW_PROMPTS, PROMPT_TOKENS))
    with (folder / "documents.jsonl").open("w") as file:
        for document in words.reshape(-1, 8 * PROMPT_TOKENS):
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in document)}) + "\n")
    path = folder / "bench.toml"
    path.write_text(f"""
description = "gelu-1l's shape on random words"
[tokenize]
language_model = "{folder}"
train_tokens = {windows * WINDOW_PROMPTS * PROMPT_TOKENS}
held_out_tokens = {4 * PROMPT_TOKENS}
sources = [{{ name = "words", kind = "files", files = ["{folder}/documents.jsonl"] }}]
[harvest]
language_model = "{folder}"
window_prompts = {WINDOW_PROMPTS}
model_batch_prompts = {BATCH}
[train.autoencoder]
d_sae = 16384
l1_coeff = 1
steps = 1
batch_rows = 4096
learning_rate = 1e-4
[analyze]
analyses = []
""")
    return path


def hand_written(folder: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The pass to the hook, as one would write it down."""
    w = load_file(folder / "model.safetensors", device=device)
    heads, width = SHAPE["n_heads"], SHAPE["d_head"]
    projections = [
        (w[f"blocks.0.attn.W_{n}"].transpose(1, 2).flatten(0, 1).contiguous(), w[f"blocks.0.attn.b_{n}"].flatten())
        for n in "QKV"
    ]
    out, mlp = w["blocks.0.attn.W_O"].flatten(0, 1).T.contiguous(), w["blocks.0.mlp.W_in"].T.contiguous()

    @torch.inference_mode()
    def forward(tokens: torch.Tensor) -> torch.Tensor:
        x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
        y = F.layer_norm(x, x.shape[-1:], w["blocks.0.ln1.w"], w["blocks.0.ln1.b"])
        q, k, v = (F.linear(y, *p).view(*y.shape[:2], heads, width).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, out, w["blocks.0.attn.b_O"])
        y = F.layer_norm(x, x.shape[-1:], w["blocks.0.ln2.w"], w["blocks.0.ln2.b"])
        return F.gelu(F.linear(y, mlp, w["blocks.0.mlp.b_in"]))

    return forward


def harvest_once(preset: Path, root: Path, device: str, threads: int, workers: int | None = None) -> dict[str, float]:
    """In this process, or by so many workers: one harvest; seconds, and memory above what there was before it."""
    config = load_preset(str(preset))
    reporter = Timed()
    workspace = Workspace.open(Runtime(root=root, device=device, threads=threads, workers=workers), reporter)
    parent = tokens.tokenize(config.tokenize, workspace).artifact
    stated, before = 0, 0

    def note(layouts: Sequence[Layout], **settings: int) -> None:
        """Where the stage, with its model loaded, asks whether it fits: what it then says that it needs."""
        nonlocal stated, before
        stated, before = sum(harvest_needs(layouts, **settings).values()), resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew

    stage.require_memory = note
    began = time.perf_counter()
    artifact = stage.harvest(config.harvest, parent, workspace).artifact
    whole = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rows, windows = facts(artifact)["rows"], facts(artifact)["windows"]
    return {
        "seconds": reporter.seconds, "whole_stage_seconds": whole,
        "steady_seconds": reporter.seconds_between(2 * rows // windows, rows), "steady_windows": windows - 2,
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024 - before, "stated_bytes": stated,
        "tokens": facts(parent)["train"]["tokens"], "rows": rows,
        "bytes": artifact.manifest.total_bytes, "files": len(artifact.manifest.files),
        "windows": windows,
    }  # fmt: skip


def in_a_process(preset: Path, folder: Path, device: str, threads: int, workers: int | None = None) -> dict[str, float]:
    """:func:`harvest_once` in a new process and a new store that shares the prompts."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        (Path(root) / "tokenize").symlink_to(folder / "prompts" / "tokenize")
        (Path(root) / "sparsemill-store.json").write_bytes((folder / "prompts/sparsemill-store.json").read_bytes())
        command = [sys.executable, "-m", "bench.harvesting", "--once", str(preset), root, "--device", device]
        command += ["--threads", str(threads), *(["--workers", str(workers)] if workers else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, device: str, threads: int, rounds: int, windows: int) -> dict[str, Any]:
    write_model(folder)
    preset = write_preset(folder, windows)
    say("writing the prompts")
    config = load_preset(str(preset))
    parent = tokens.tokenize(config.tokenize, Workspace.open(Runtime(root=folder / "prompts"))).artifact
    prompts = tokens.TokenTable(parent).ids("train", range(FORWARD_PROMPTS)).to(device)
    model = language_model.load(str(folder), device=device)
    by_hand = hand_written(folder, device)
    torch.set_num_threads(threads)
    n_tokens = prompts.numel()
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def each(run: Callable[[torch.Tensor], object], part: int = 1) -> Callable[[], None]:
        def work() -> None:
            for batch in prompts[: len(prompts) // part].split(BATCH):
                run(batch)
            synchronize()

        return work

    def cached(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            model.bridge.run_with_cache(batch)

    workers = ThreadPoolExecutor(threads)

    def in_workers() -> None:
        with single_threaded():
            list(workers.map(lambda batch: model.activations(batch, SITE) is None, prompts.split(BATCH)))

    harvests: list[dict[str, float]] = []

    def harvest() -> None:
        harvests.append(in_a_process(preset, folder, device, threads))
        peak, stated = harvests[-1]["peak_bytes"], harvests[-1]["stated_bytes"]
        if peak > stated:
            raise RuntimeError(f"a harvest took {peak:,} bytes at its peak, more than the {stated:,} stated before it")

    rows = model.activations(prompts[:BATCH], SITE).half()
    layout = Layout(1, WINDOW_PROMPTS, PROMPT_TOKENS - 1, SHAPE["d_mlp"], 256, "float16", 0, WINDOW_PROMPTS)
    window = WindowBuffer(layout, 0)
    window.place(0, np.zeros((WINDOW_PROMPTS * layout.positions, layout.d_in), np.float16))

    def disk() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            names = window.write(Path(place))
            atomic.sync_files([Path(place) / name for name in names], top=Path(place))

    things: dict[str, Callable[[], object]] = {
        "run_with_cache": each(cached, 16),
        "bridge to the hook": each(lambda batch: model._by_hooks(batch, [SITE])),  # noqa: SLF001  (what is compared)
        "hand-written": each(by_hand),
        "forward": each(lambda batch: model.activations(batch, SITE)),
        "forward in workers": in_workers,
        "device to host": each(lambda _: rows.cpu() if device != "cpu" else rows.clone()),
        "disk": disk,
        "harvest": harvest,
    }
    for name in ("bridge to the hook", "hand-written", "forward", "forward in workers"):
        things[name]()  # warm
    say(f"{rounds} rounds of {', '.join(things)}")
    measured = interleave(things, rounds)
    amounts = dict.fromkeys(things, n_tokens) | {
        "run_with_cache": n_tokens // 16, "disk": WINDOW_PROMPTS * PROMPT_TOKENS,
    }  # fmt: skip
    rates = {name: measured.runs[name].rates(amounts[name]) for name in things if name != "harvest"}
    one = harvests[0]
    for name, key, amount in (
        ("harvest", "steady_seconds", one["tokens"] * one["steady_windows"] / one["windows"]),
        ("harvest, ends included", "seconds", one["tokens"]),
    ):
        seconds = [once[key] for once in harvests]
        rates[name] = Runs(seconds, seconds).rates(amount)
        rates[name].pop("per_cpu_second")  # another process's
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu", "threads": threads, "rounds": rounds,
        "seed": 0, "load": measured.load, "model_batch_prompts": BATCH, "window_prompts": WINDOW_PROMPTS,
        "windows": windows, "tokens_per_second": rates, "ratios": _ratios(rates), "harvests": harvests,
        "layout_bytes_per_row": {e: _bytes_per_row(e) for e in ("float16", "uint8")},
    }  # fmt: skip


def _ratios(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    median = {name: rate["median"] for name, rate in rates.items()}
    fastest = max(median["forward"], median["forward in workers"])
    return {
        "harvest / fastest bare forward": median["harvest"] / fastest,
        "harvest / slowest of forward, device to host, disk": median["harvest"]
        / min(fastest, median["device to host"], median["disk"]),
        "forward / run_with_cache": median["forward"] / median["run_with_cache"],
        "forward / hand-written": median["forward"] / median["hand-written"],
        "forward / bridge to the hook": median["forward"] / median["bridge to the hook"],
    }


def _bytes_per_row(encoding: Any) -> float:
    """At the presets' window of 8,192 prompts of 128 tokens, BOS left out; all arrays of a store."""
    layout = Layout(1, 8192, 127, SHAPE["d_mlp"], 256, encoding, 0, 8192)
    return layout.bytes / layout.n_rows


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The blocks of docs/performance.md."""
    machine, harvests = figures["machine"], figures["harvests"]
    gib = 2**30
    return {
        "rates": markdown(
            ["tokens a second", "median", "least", "greatest"],
            ([name, *(f"{rate[key]:,.0f}" for key in ("median", "low", "high"))]
             for name, rate in figures["tokens_per_second"].items()),
        ),
        "ratios": markdown(["ratio of medians", ""], ([k, f"{v:.2f}"] for k, v in figures["ratios"].items())),
        "memory": markdown(
            ["a harvest", "GiB at its peak", "GiB stated before it"],
            ([number + 1, f"{once['peak_bytes'] / gib:.2f}", f"{once['stated_bytes'] / gib:.2f}"]
             for number, once in enumerate(harvests)),
        ),
        "bytes": markdown(
            ["encoding", "bytes a row of 2,048", "more than the codes alone"],
            ([encoding, f"{found:,.1f}", f"{found / (SHAPE['d_mlp'] * ENCODED[encoding]) - 1:.2%}"]
             for encoding, found in figures["layout_bytes_per_row"].items()),
        ),
        "machine": (
            f"{machine['cpu']}, {figures['threads']} threads on {figures['device']}, {machine['system']}; torch "
            f"{machine['versions']['torch']}. {figures['rounds']} rounds; {figures['windows']} windows of "
            f"{figures['window_prompts']:,} prompts, {figures['model_batch_prompts']} prompts a pass; load average "
            f"{figures['load'][0]:.1f} before and {figures['load'][1]:.1f} after."
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help="windows a harvest, of 1,024 prompts")
    parser.add_argument("--folder", type=Path, help="where the stores are written for the while")
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        preset, root = options.once
        print(json.dumps(harvest_once(preset, root, options.device, options.threads, options.workers)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.device, options.threads, options.rounds, options.windows)
    name = "cpu" if options.device == "cpu" else "-".join(figures["device"].lower().split())
    path = write_results(f"harvesting-{name}", figures)
    print(json.dumps(figures["ratios"], indent=1))
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
