"""A small world whose truth is planted: rows, prompts, a language model of two matrices, and autoencoders."""

import pickle
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.analysis import AnalysisResult, Context, FeatureDensities, to_files
from pipeline.analysis.passes import Pass
from pipeline.analysis.survey import Survey
from pipeline.analysis.surveying import Places, SurveyState
from sae.autoencoder import Autoencoder
from sae.kernels.encoder import SparseEncoder

HOOK = "blocks.0.mlp.hook_post"


@dataclass
class Rows:
    """A store in memory."""

    rows: np.ndarray
    prompt: np.ndarray
    position: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    def sequential(self, batch_rows: int, *, start: int = 0, prefetch: int = 2) -> Iterator[SimpleNamespace]:  # noqa: ARG002
        for first in range(start * batch_rows, self.n_rows, batch_rows):
            part = slice(first, first + batch_rows)
            yield SimpleNamespace(rows=self.rows[part], prompt=self.prompt[part], position=self.position[part])


@dataclass
class Prompts:
    """Tokens in memory."""

    train: np.ndarray
    held_out: np.ndarray

    def n_prompts(self, split: str) -> int:
        return len(getattr(self, split))

    def prompts(self, split: str, numbers: list[int] | None = None) -> np.ndarray:
        found = getattr(self, split)
        return found if numbers is None else found[numbers]


@dataclass
class TwoMatrixModel:
    """activation = relu(embedding of the token + of the position); logits = activation @ W_out @ W_U."""

    W_E: torch.Tensor
    W_pos: torch.Tensor
    W: torch.Tensor
    W_U: torch.Tensor

    def W_out(self, layer: int) -> torch.Tensor:
        assert layer == 0
        return self.W

    def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        assert hook_name == HOOK
        return torch.relu(self.W_E[tokens] + self.W_pos[: tokens.shape[1]])

    def logits(
        self, tokens: torch.Tensor, edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None
    ) -> torch.Tensor:
        acts = self.activations(tokens, HOOK)
        if edits:
            acts = edits[HOOK](acts)
        return acts @ self.W @ self.W_U

    def loss_gradient(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:
        acts = self.activations(tokens, hook_name).requires_grad_()
        logits = (acts @ self.W @ self.W_U)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
        return torch.autograd.grad(loss, acts)[0]


def make_model(
    d_mlp: int = 24, d_model: int = 6, d_vocab: int = 40, positions: int = 10, seed: int = 0
) -> TwoMatrixModel:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_vocab, d_mlp), (positions, d_mlp), (d_mlp, d_model), (d_model, d_vocab))
    return TwoMatrixModel(*(torch.randn(*shape, generator=generator) for shape in shapes))


def make_rows(rows: np.ndarray, prompt_rows: int = 8) -> Rows:
    number = np.arange(len(rows))
    return Rows(np.asarray(rows, np.float32), number // prompt_rows, 1 + number % prompt_rows)


def make_autoencoder(W_enc: np.ndarray, b_enc: np.ndarray, W_dec: np.ndarray, b_dec: np.ndarray) -> Autoencoder:
    return Autoencoder(*(torch.from_numpy(np.asarray(part, np.float32)) for part in (W_enc, b_enc, W_dec, b_dec)))


def make_survey(
    sae: Autoencoder, rows: Rows, *, n_rows: int | None = None, top: int = 4, sample: int = 8, seldom: int = 256
) -> Survey:
    """The survey of an autoencoder over rows, in batches that fit neither."""
    state, encoder = SurveyState.empty(sae.d_sae, Places(top, sample, seldom)), SparseEncoder(sae, threads=1)
    for start in range(0, n_rows or rows.n_rows, 700):
        part = slice(start, min(start + 700, n_rows or rows.n_rows))
        where = (column[part].astype(np.int32) for column in (rows.prompt, rows.position))
        state.take(encoder.encode(rows.rows[part]), *where)
    return state.survey()


def make_context(
    encoder: np.ndarray, decoder: np.ndarray, *, rare: int = 0, trainer: Mapping[str, Any] | None = None, **fields: Any
) -> Context:
    """An autoencoder from rows (d_sae, d_in); its first ``rare`` features are dead, the others fire on a tenth."""
    d_sae, d_in = encoder.shape
    counts = np.where(np.arange(d_sae) < rare, 0, 10_000)
    return Context(
        sae=make_autoencoder(encoder.T, np.zeros(d_sae), decoder, np.zeros(d_in)),
        hook_name=HOOK,
        densities=FeatureDensities(counts, 100_000),
        sae_config={"autoencoder": dict(trainer or {})},
        **fields,
    )


def random_units(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Random unit rows (n, d)."""
    rows = rng.standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class Elsewhere:
    """Passes as a cluster computes them: a few batches at a time, the last first, all of it sent to and fro as bytes.

    Attributes:
        size: batches a piece.
        computed: pieces computed of each pass, by its label.
        sent: the largest piece, and the largest part, in bytes, by label.
    """

    size: int
    computed: dict[str, int] = field(default_factory=dict)
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)

    def in_order(self, work: Pass[Any, Any], context: Context) -> Generator[Any]:
        pieces = [pickle.dumps(work.batches[at : at + self.size]) for at in range(0, len(work.batches), self.size)]
        opening = pickle.dumps(work.opening)
        needs = {"model": "model", "store": "reader", "tokens": "tokens", "density": "densities", "survey": "survey"}
        unread = {field: None for need, field in needs.items() if need not in work.reads}
        answers: list[list[bytes]] = []
        for piece in reversed(pieces):
            parts = pickle.loads(opening)(replace(context, **unread))
            answers.insert(0, [pickle.dumps(part) for part in parts(pickle.loads(piece))])
        self.computed[work.label] = len(pieces)
        sizes = [len(part) for answer in answers for part in answer]
        self.sent[work.label] = max(len(piece) + len(opening) for piece in pieces), max(sizes)
        for answer in answers:
            yield from map(pickle.loads, answer)


def assert_same_elsewhere(run: Callable[[Context], AnalysisResult], context: Context) -> Elsewhere:
    """The result, bit for bit, whoever computes the passes, in pieces of any size; how pieces of one were computed."""
    expected = to_files(run(context))
    for size in (3, 2, 1):
        elsewhere = Elsewhere(size)
        assert to_files(run(replace(context, passes=elsewhere))) == expected
    return elsewhere


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def world() -> SimpleNamespace:
    """The builders above, by name."""
    return SimpleNamespace(
        HOOK=HOOK,
        Rows=Rows,
        Prompts=Prompts,
        model=make_model,
        rows=make_rows,
        autoencoder=make_autoencoder,
        survey=make_survey,
        context=make_context,
        units=random_units,
        assert_same_elsewhere=assert_same_elsewhere,
    )
