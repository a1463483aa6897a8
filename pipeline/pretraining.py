"""Trains the shipped demo language model: ``python -m pipeline.pretraining OUT_FOLDER``.

A 1-layer GELU transformer of gelu-1l's architecture at small size, on the training side of the standard library's split
(``standard_library.is_held_out``), tests included and prose twice. Writes what ``pipeline/assets/demo-model`` holds:
``tokenizer.json``, ``config.json`` and ``model.safetensors`` (TransformerLens's legacy property names, the layout of
gelu-1l itself, so one loader serves both), ``training-log.parquet`` and ``training.json`` with seed, versions and the
held-out figures beside a unigram and a bigram model.

The forward pass is TransformerLens's own ``NativeModel``, compiled, under bf16 autocast with fp32 master weights.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model

from pipeline import standard_library
from pipeline.language_model import special_token_id
from pipeline.packing import pack_documents

BOS, EOS = "<|BOS|>", "<|EOS|>"
Prompts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Pretraining:
    """Everything the shipped model is a function of, besides the library's text."""

    d_model: int = 128
    d_mlp: int = 512
    n_heads: int = 4
    n_ctx: int = 128
    d_vocab: int = 4096
    steps: int = 12_000
    batch_prompts: int = 64
    micro_batch_prompts: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    prose_repeats: int = 2
    seed: int = 0


def main(out: Path, settings: Pretraining) -> None:
    """Trains, evaluates and writes the model; about an hour on two cores."""
    out.mkdir(parents=True, exist_ok=True)
    plain, with_tests = standard_library.read_modules(), standard_library.read_modules(tests=True)
    tokenizer = train_tokenizer(plain, settings.d_vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    train = np.concatenate(
        [pack(tokenizer, with_tests, "code", False, settings.n_ctx)]
        + [pack(tokenizer, with_tests, "prose", False, settings.n_ctx)] * settings.prose_repeats
    )
    held_out = {kind: pack(tokenizer, plain, kind, True, settings.n_ctx) for kind in ("code", "prose")}
    print(f"train {train.size:,} tokens; held out", {k: v.size for k, v in held_out.items()}, flush=True)
    started = time.monotonic()
    model, log = train_model(train, held_out, settings)
    config = {
        "n_layers": 1, "d_model": settings.d_model, "d_mlp": settings.d_mlp,
        "d_head": settings.d_model // settings.n_heads, "n_heads": settings.n_heads, "n_ctx": settings.n_ctx,
        "d_vocab": settings.d_vocab, "act_fn": "gelu", "attn_only": False, "normalization": "LN", "ln_eps": 1e-5,
        "shortformer_pos": False, "tokenizer_name": None,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(property_state(model, settings), out / "model.safetensors")
    pq.write_table(pa.Table.from_pylist(log), out / "training-log.parquet")
    record = {
        "command": "python -m pipeline.pretraining OUT_FOLDER",
        "settings": asdict(settings),
        "train_tokens": settings.steps * settings.batch_prompts * settings.n_ctx,
        "train_unique_tokens": int(np.unique(train, axis=0).size),
        "corpus_sha256": standard_library.corpus_sha256(with_tests),
        "seconds": round(time.monotonic() - started),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "held_out": evaluate(model, tokenizer, train, held_out, settings),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["held_out"], indent=2))


def train_tokenizer(modules: list[standard_library.Module], d_vocab: int) -> Tokenizer:
    """A byte-level BPE on the training side's code and prose; digits stand alone, as in gelu-1l's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = (
        text
        for module in modules if not standard_library.is_held_out(module.path)
        for kind in ("code", "prose") for _, text in standard_library.documents(module, kind)
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(
    tokenizer: Tokenizer, modules: list[standard_library.Module], kind: standard_library.Kind, held_out: bool, n: int
) -> Prompts:
    """Prompts (count, n) of one side and kind, BOS at position 0."""
    texts = [
        text
        for module in modules if standard_library.is_held_out(module.path) == held_out
        for _, text in standard_library.documents(module, kind)
    ]  # fmt: skip
    ids = ((i, np.array(e.ids, np.int32)) for i, e in enumerate(tokenizer.encode_batch(texts)))
    bos, eos = special_token_id(tokenizer, (BOS,)), special_token_id(tokenizer, (EOS,))
    blocks = [prompts for prompts, _ in pack_documents(ids, prompt_tokens=n, bos_id=bos, eos_id=eos)]
    return np.concatenate(blocks)


def train_model(
    train: Prompts, held_out: dict[str, Prompts], settings: Pretraining
) -> tuple[NativeModel, list[dict[str, float]]]:
    """AdamW with warm-up and cosine decay to zero; each epoch a fresh permutation of the prompts."""
    config = TransformerBridgeConfig(
        d_model=settings.d_model, n_layers=1, d_mlp=settings.d_mlp, d_head=settings.d_model // settings.n_heads,
        n_heads=settings.n_heads, n_ctx=settings.n_ctx, d_vocab=settings.d_vocab, act_fn="gelu", attn_only=False,
        normalization_type="LN", positional_embedding_type="standard", seed=settings.seed,
    )  # fmt: skip
    model = NativeModel(config)
    initialize_native_model(model, config)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    loss_of = torch.compile(partial(mean_loss, model), dynamic=False)
    order = _order(len(train), settings)
    log: list[dict[str, float]] = []
    running, started = 0.0, time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = torch.from_numpy(train[next(order)]).long()
        optimizer.zero_grad(set_to_none=True)
        for micro in batch.split(settings.micro_batch_prompts):
            loss = loss_of(micro) * (len(micro) / len(batch))
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            entry = {"step": step, "train_nats": running / 250, "seconds": time.monotonic() - started}
            entry |= {f"held_out_{k}_nats": float(nats(model, v[:400]).mean()) for k, v in held_out.items()}
            log.append(entry)
            print(json.dumps(entry), flush=True)
            running = 0.0
    return model, log


def mean_loss(model: NativeModel, prompts: torch.Tensor) -> torch.Tensor:
    """Mean next-token nats of prompts (n, n_ctx)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(prompts[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), prompts[:, 1:].flatten())


@torch.no_grad()
def nats(model: NativeModel, prompts: Prompts) -> npt.NDArray[np.float64]:
    """Next-token nats in fp32, (n, n_ctx - 1)."""
    out: list[torch.Tensor] = []
    for block in torch.from_numpy(prompts).long().split(32):
        logits = model(block[:, :-1]).float()
        out.append(F.cross_entropy(logits.transpose(1, 2), block[:, 1:], reduction="none"))
    return torch.cat(out).double().numpy()


def evaluate(
    model: NativeModel, tokenizer: Tokenizer, train: Prompts, held_out: dict[str, Prompts], settings: Pretraining
) -> dict[str, dict[str, float]]:
    """Held-out nats per token and bits per byte of the model, a unigram and a bigram model, by kind and together."""
    size = settings.d_vocab
    token_bytes = np.array([len(tokenizer.id_to_token(i) or "") for i in range(size)])  # byte-level: a character a byte
    token_bytes[[special_token_id(tokenizer, (name,)) for name in (BOS, EOS)]] = 0
    unigram = np.bincount(train[:, 1:].ravel(), minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:, :-1].ravel().astype(np.int64) * size + train[:, 1:].ravel(), minlength=size * size)
    pairs = pairs.reshape(size, size).astype(np.float32)
    strength = 64.0  # prior weight of the unigram in each row (Dirichlet back-off)
    rows = pairs.sum(1)
    figures: dict[str, dict[str, float]] = {}
    for kind, prompts in {**held_out, "all": np.concatenate(list(held_out.values()))}.items():
        before, after = prompts[:, :-1], prompts[:, 1:]
        per_byte = 1 / (math.log(2) * float(token_bytes[after].sum()))
        losses = {
            "model": nats(model, prompts),
            "bigram": -np.log((pairs[before, after] + strength * unigram[after]) / (rows[before] + strength)),
            "unigram": -np.log(unigram[after]),
        }
        figures[kind] = {"tokens": int(after.size)}
        for name, loss in losses.items():
            figures[kind][f"{name}_nats_per_token"] = round(float(loss.mean()), 4)
            figures[kind][f"{name}_bits_per_byte"] = round(float(loss.sum()) * per_byte, 4)
    return figures


def property_state(model: NativeModel, settings: Pretraining) -> dict[str, torch.Tensor]:
    """Weights under TransformerLens's legacy property names and shapes, as in gelu-1l's own checkpoint."""
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    heads, width = settings.n_heads, settings.d_model
    block: dict[str, torch.Tensor] = {}
    for letter in "qkv":
        weight = state[f"layers.0.attn.{letter}.weight"]
        block[f"attn.W_{letter.upper()}"] = weight.view(heads, -1, width).transpose(1, 2)
        block[f"attn.b_{letter.upper()}"] = state[f"layers.0.attn.{letter}.bias"].view(heads, -1)
    block["attn.W_O"] = state["layers.0.attn.o.weight"].view(width, heads, -1).permute(1, 2, 0)
    block["attn.b_O"] = state["layers.0.attn.o.bias"]
    for ln in ("ln1", "ln2"):
        block[f"{ln}.w"], block[f"{ln}.b"] = state[f"layers.0.{ln}.weight"], state[f"layers.0.{ln}.bias"]
    block["mlp.W_in"], block["mlp.b_in"] = state["layers.0.mlp.fc_in.weight"].T, state["layers.0.mlp.fc_in.bias"]
    block["mlp.W_out"], block["mlp.b_out"] = state["layers.0.mlp.fc_out.weight"].T, state["layers.0.mlp.fc_out.bias"]
    tensors = {f"blocks.0.{name}": tensor for name, tensor in block.items()} | {
        "embed.W_E": state["tok_embed.weight"],
        "pos_embed.W_pos": state["pos.weight"],
        "ln_final.w": state["ln_out.weight"],
        "ln_final.b": state["ln_out.bias"],
        "unembed.W_U": state["head.weight"].T,
    }
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _rate(step: int, settings: Pretraining) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)))


def _order(n_prompts: int, settings: Pretraining) -> Iterator[npt.NDArray[np.int64]]:
    generator = np.random.default_rng(settings.seed)
    while True:
        permutation = generator.permutation(n_prompts)
        for start in range(0, n_prompts - settings.batch_prompts + 1, settings.batch_prompts):
            yield permutation[start : start + settings.batch_prompts]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Pretraining())
