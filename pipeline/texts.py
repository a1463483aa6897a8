"""Text around a row: from (prompt, position) to what stands before, at and after that token.

Tokens of a byte-level vocabulary may end in the middle of a character, so a token alone need not be text. A prompt is
therefore cut at the token boundaries that are character boundaries too: those where the text of the tokens so far is
the beginning of the text of all of them. The piece that holds a token is at times a token or two longer than it. Cost:
a prompt of T tokens is decoded T times, a millisecond at 128 tokens. Rejected: decoding each token by itself (a
character of two tokens becomes two replacement signs), and the byte tables of one kind of tokenizer (others have none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer

from pipeline import language_model
from pipeline.tokens import TokenTable, tokenizer_of
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError


@dataclass(frozen=True)
class Excerpt:
    """A token in its text; as a string the token stands in guillemets, in a notebook it is marked.

    Attributes:
        before: text before the token.
        token: text of the token, or of the few tokens that make up its characters.
        after: text after it.
    """

    before: str
    token: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}«{self.token}»{self.after}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.before)}<mark>{escape(self.token)}</mark>{escape(self.after)}</pre>"


@dataclass(frozen=True)
class Highlighted:
    """A text with a feature's activation on every token.

    As a string, pieces that it fires on stand in guillemets; in a notebook they are marked, the stronger the fuller,
    and pointing at one tells the activation.

    Attributes:
        pieces: text of each token, or of the few tokens that make up its characters.
        activations: of each piece, the largest of its tokens'; 0 where the feature does not fire.
        scale: the activation that is marked in full.
    """

    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    scale: float

    def __str__(self) -> str:
        pairs = zip(self.pieces, self.activations, strict=True)
        return "".join(f"«{piece}»" if activation > 0 else piece for piece, activation in pairs)

    def to_html(self) -> str:
        """The text, escaped, with the pieces that it fires on marked."""
        pairs = zip(self.pieces, self.activations, strict=True)
        return f"<pre>{''.join(self._marked(escape(piece), activation) for piece, activation in pairs)}</pre>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def _marked(self, piece: str, activation: float) -> str:
        if activation <= 0:
            return piece
        fullness = min(0.15 + 0.65 * activation / self.scale, 0.8)
        style = f"color: inherit; background: rgba(255, 150, 0, {fullness:.2f})"
        return f'<mark style="{style}" title="{activation:.3g}">{piece}</mark>'


class Origin(NamedTuple):
    """Where a prompt comes from.

    Attributes:
        source: name of the source in the config.
        document: name of the document in which the prompt begins; it may go on into others.
    """

    source: str
    document: str


class Texts:
    """The texts of a tokens artifact's training prompts, as an activation store's ``prompt`` numbers them.

    Args:
        tokens: the prompts.
        tokenizer: that made them.

    Examples:
        >>> texts = sparsemill.open_texts("latest")
        >>> batch = sparsemill.open_activations("latest").read(0, 1)
        >>> excerpt = texts.around(batch.prompt[0], batch.position[0], before=20, after=10)
        >>> str(excerpt) == f"{excerpt.before}«{excerpt.token}»{excerpt.after}"
        True
        >>> source, document = texts.source(batch.prompt[0])
    """

    def __init__(self, tokens: TokenTable, tokenizer: Tokenizer):
        self._tokens = tokens
        self._tokenizer = tokenizer

    def prompt(self, number: int) -> str:
        """Text of a whole prompt, special tokens included.

        A character that the prompt's beginning or end cuts in two shows as the replacement sign.

        Raises:
            InputError: there is no such prompt.
        """
        return _decode(self._tokenizer, self._ids(number))

    def around(self, prompt: int, position: int, before: int = 20, after: int = 10) -> Excerpt:
        """A token in its text, special tokens included.

        Args:
            prompt: the prompt's number.
            position: the token's, from 0.
            before: tokens before it that are shown, as far as there are any.
            after: tokens after it that are shown, as far as there are any.

        Raises:
            InputError: no such prompt or position, or ``before`` or ``after`` is negative.
        """
        ids = self._ids(prompt)
        if not 0 <= position < len(ids) or min(before, after) < 0:
            raise InputError(
                "no such token, or no such length of text", where=f"prompt {prompt}",
                found=f"position {position}, {before} tokens before and {after} after",
                expected=f"a position from 0 to {len(ids) - 1}, and 0 or more tokens",
            )  # fmt: skip
        text, cuts = _cut(self._tokenizer, ids)
        start, end = _last(cuts, position), _first(cuts, position + 1)
        first, last = _last(cuts, max(0, start - before)), _first(cuts, min(len(ids), end + after))
        return Excerpt(text[cuts[first] : cuts[start]], text[cuts[start] : cuts[end]], text[cuts[end] : cuts[last]])

    def source(self, prompt: int) -> Origin:
        """Where a prompt comes from: its source, and the document that it begins in.

        Raises:
            InputError: there is no such prompt.
        """
        self._check(prompt)
        document = self._documents.slice(int(self._document_of[prompt]), 1)
        return Origin(document["source"][0].as_py(), document["name"][0].as_py())

    def _ids(self, prompt: int) -> list[int]:
        self._check(prompt)
        return self._tokens.prompts("train", [prompt])[0].tolist()

    def _check(self, prompt: int) -> None:
        n = self._tokens.n_prompts("train")
        if not 0 <= prompt < n:
            raise InputError("no such prompt", where=self._tokens.artifact.id, found=prompt, expected=f"0 to {n - 1}")

    @cached_property
    def _document_of(self) -> npt.NDArray[np.int32]:
        return self._tokens.column("train", "document")

    @cached_property
    def _documents(self) -> pa.Table:
        return self._tokens.documents()


def texts_of(activations: Artifact, tokens: Artifact) -> Texts:
    """The texts that an activation store's rows stand in.

    Args:
        activations: a harvest artifact, which names the model that has the tokenizer.
        tokens: its parent.

    Raises:
        ConfigError: the model of that name has another tokenizer now.
    """
    name = language_model.recorded_name(activations)
    tokenizer, identity = tokenizer_of(name)
    found, expected = identity["tokenizer_sha256"], str(tokens.config["tokenizer_sha256"])
    if found != expected:
        raise ConfigError(
            f"model {name} has another tokenizer than the prompts were made with", where=tokens.id,
            found=f"tokenizer sha256 {found[:12]}", expected=expected[:12], remedy="restore that model's files",
        )  # fmt: skip
    return Texts(TokenTable(tokens), tokenizer)


def highlight(
    tokenizer: Tokenizer,
    ids: list[int],
    activations: npt.NDArray[np.floating[Any]] | Sequence[float],
    scale: float | None = None,
) -> Highlighted:
    """Puts a feature's activations on the text of tokens.

    Args:
        tokenizer: that made them.
        ids: of the tokens, n.
        activations: of the feature, 0 or more, (n,).
        scale: the activation that is marked in full; the largest of these by default.
    """
    text, cuts = _cut(tokenizer, ids)
    pieces: list[str] = []
    found: list[float] = []
    for start, end in pairwise(sorted(cuts)):
        pieces.append(text[cuts[start] : cuts[end]])
        found.append(float(max(activations[start:end])))
    return Highlighted(tuple(pieces), tuple(found), max(found, default=0.0) if scale is None else scale)


def _cut(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, dict[int, int]]:
    """The text of all tokens and, for each token boundary that is a character's too, how much is before it."""
    text = _decode(tokenizer, ids)
    boundaries: dict[int, int] = {}
    for count in range(len(ids)):
        so_far = _decode(tokenizer, ids[:count])
        if text.startswith(so_far):
            boundaries.setdefault(len(so_far), count)  # tokens without text of their own join the next one
    boundaries[len(text)] = len(ids)
    return text, {count: length for length, count in boundaries.items()}


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _last(cuts: dict[int, int], position: int) -> int:
    return max(cut for cut in cuts if cut <= position)


def _first(cuts: dict[int, int], position: int) -> int:
    return min(cut for cut in cuts if cut >= position)
