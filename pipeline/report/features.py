"""The feature explorer's data: one table of all features, and a file of details for every 64 of them.

The feature table joins the tables named ``features`` of all analyses. Of two columns of one name and other contents,
the later gets its analysis' name in front. Two are added after ``density``: ``l0_share``, a feature's part of the mean
number of features firing on a token, and ``rare``, whether it is ultra-low.

Details are the case studies': example texts, histogram, logits, neighbours, neurons. A page loads the one file that
holds its feature, of some 100 kB (16,384 features have 256 of them), and the vocabulary once: tokens are numbers in it,
the commonest first, since short numbers of a skewed kind deflate to a third of the words. Rejected: a file a feature
(16,384 files, slow to copy), and one file (20 MB before the first text).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.report import rendering, tables
from pipeline.report.inputs import Section

SHARD_FEATURES = 64
DETAILS = ("examples", "histograms", "logits", "neighbours", "neurons", "vocabulary")
"""Tables of the case studies that the explorer shows."""
_DIGITS = 3
_FIRST = (
    "feature", "top_token", "density", "l0_share", "max_activation", "fve_top_1", "decoder_kurtosis",
    "encoder_decoder_cosine", "encoder_null_fraction", "decoder_null_fraction", "rare", "label",
)  # fmt: skip


class _Vocabulary(NamedTuple):
    """Tokens in the order of how often the details show them.

    Attributes:
        words: text of each, the commonest first.
        ranks: place in ``words`` of each token id, (largest id + 1,).
    """

    words: list[str]
    ranks: npt.NDArray[np.int32]


def place_of(section: str, table: str) -> tables.Place:
    """Where a table of an analysis is shown, beside the explorer."""
    return "artifact" if section == "case_studies" and table in DETAILS else "page"


def feature_table(sections: Sequence[Section]) -> pa.Table | None:
    """All that the analyses say of each feature, a row a feature; None where they say nothing."""
    having = [section for section in sections if tables.FEATURES in section.result.tables]
    found = [(section, section.result.tables[tables.FEATURES]) for section in having]
    if not found:
        return None
    numbers = [table["feature"].to_numpy() for _, table in found]
    features = np.unique(np.concatenate(numbers))
    joined: dict[str, Any] = {"feature": pa.array(features.astype(np.int32))}
    for (section, table), own in zip(found, numbers, strict=True):
        order = np.argsort(own, kind="stable")
        at = np.minimum(np.searchsorted(own[order], features), own.size - 1)
        rows = pa.array(order[at], mask=own[order][at] != features)
        for name in table.column_names:
            column = table[name].take(rows)
            if name not in joined:
                joined[name] = column
            elif name != "feature" and not column.equals(joined[name]):
                joined[f"{section.name}_{name}"] = column
        if section.name == "density" and "density" in table.column_names:
            joined |= _of_density(joined["density"], section)
    return pa.table(joined)


def explorer_files(table: pa.Table, sections: Sequence[Section]) -> dict[str, bytes]:
    """The explorer's data files, and the feature table as Parquet.

    Args:
        table: :func:`feature_table`.
        sections: the analyses; where the case studies are not among them there are no details.
    """
    columns = tables.columns(table)
    first = {name: place for place, name in enumerate(_FIRST)}
    columns.sort(key=lambda column: first.get(str(column["name"]), len(first)))
    shown = [column | {"shown": column["name"] in first} for column in columns]
    files = {
        f"tables/{tables.FEATURES}.parquet": tables.to_parquet(table),
        "features/columns.js": rendering.packed("features/columns", shown),
    }
    for section in sections:
        if section.name == "case_studies":
            studied = section.result.tables
            words = _commonest_first(studied)
            files["features/vocabulary.js"] = rendering.packed("features/vocabulary", words.words)
            for number, details in _shards(studied, words.ranks):
                name = f"features/{number:04d}"
                files[f"{name}.js"] = rendering.packed(name, details)
    return files


def has_details(sections: Sequence[Section]) -> bool:
    """Whether there are details of features."""
    return any(section.name == "case_studies" for section in sections)


def _of_density(density: pa.ChunkedArray, section: Section) -> dict[str, pa.ChunkedArray]:
    values, below = density.to_numpy(), section.options.get("ultra_low_below")
    total = np.nansum(values)
    added = {"l0_share": pa.chunked_array([pa.array(values / total, from_pandas=True)])} if total else {}
    return added | ({"rare": pa.chunked_array([pa.array(values < below)])} if isinstance(below, float) else {})


def _commonest_first(studied: Mapping[str, pa.Table]) -> _Vocabulary:
    ids, words = studied["vocabulary"]["token_id"].to_numpy(), studied["vocabulary"]["token"].to_pylist()
    shown = (studied["examples"]["tokens"].combine_chunks().flatten(), studied["logits"]["token_id"])
    counts = np.bincount(np.concatenate([column.to_numpy() for column in shown]), minlength=ids.max(initial=-1) + 1)
    order = np.argsort(-counts[ids], kind="stable")
    ranks = np.zeros(counts.size, np.int32)
    ranks[ids[order]] = np.arange(order.size)
    return _Vocabulary([words[place] for place in order.tolist()], ranks)


def _shards(
    studied: Mapping[str, pa.Table], ranks: npt.NDArray[np.int32]
) -> Iterator[tuple[int, dict[str, dict[str, list[Any]]]]]:
    """Details, a shard at a time.

    Yields:
        A shard's number, and by table the columns of the rows of its features.
    """
    ordered = {name: _in_order(studied[name]) for name in DETAILS if name != "vocabulary"}
    ordered["studied"] = studied["features"].select(["feature"]).sort_by("feature")
    numbers = {name: table["feature"].to_numpy() for name, table in ordered.items()}
    for shard in np.unique(numbers["studied"] // SHARD_FEATURES).tolist():
        details: dict[str, dict[str, list[Any]]] = {}
        for name, table in ordered.items():
            first, last = np.searchsorted(numbers[name], [shard * SHARD_FEATURES, (shard + 1) * SHARD_FEATURES])
            part = table.slice(first, last - first)
            details[name] = (part if name == "studied" else _readable(part, ranks)).to_pydict()
        yield shard, details


def _in_order(table: pa.Table) -> pa.Table:
    """A table of details by feature, in the order in which a page shows them."""
    order = [name for name in ("feature", "kind", "direction", "rank", "from_activation") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in order])


def _readable(table: pa.Table, ranks: npt.NDArray[np.int32]) -> pa.Table:
    """A table of details, tokens by rank, and numbers of as many digits as a page shows."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name == "token_id":
            columns["token"] = pa.array(ranks[column.to_numpy()])
        elif pa.types.is_list(column.type):
            ends = np.append(0, np.cumsum(column.value_lengths().to_numpy())).astype(np.int32)
            values = column.flatten()
            shown = pa.array(ranks[values.to_numpy()]) if name == "tokens" else tables.rounded(values, _DIGITS)
            columns[name] = pa.ListArray.from_arrays(pa.array(ends), shown)
        elif name not in ("rank", "token"):
            columns[name] = tables.rounded(column, _DIGITS)
    return pa.table(columns)
