"""A report on many features, as large for each as the demo's, and the memory that it took.

``python -m tests.faults.large_report FEATURES`` prints bytes: of the tables it is made from, of its files, and by how
much the process grew beyond the tables.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.analysis.result import AnalysisResult
from pipeline.memory import resident_bytes
from pipeline.report import ReportInputs, Section, write_report
from tests.faults.peak import peak_bytes

D_VOCAB = 4096
EXAMPLES, EXAMPLE_TOKENS = 12, 25
COLUMNS = {"density": 5, "kurtosis": 2, "enc_dec": 2, "null_space": 6, "neuron_sparsity": 4, "training_dynamics": 4}
"""By analysis, what it says of each feature."""


def inputs(n_features: int) -> ReportInputs:
    """Analyses of so many features, of random numbers and skewed tokens."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(D_VOCAB)])

    def numbers(each: int, kind: Any = np.float32) -> npt.NDArray[Any]:
        return rng.standard_normal(n_features * each).astype(kind)

    def tokens(each: int) -> npt.NDArray[np.int32]:
        return (rng.zipf(1.3, n_features * each) % D_VOCAB).astype(np.int32)

    def lists(values: npt.NDArray[Any]) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, EXAMPLE_TOKENS, dtype=np.int32), values)

    def keys(each: int) -> dict[str, npt.NDArray[np.int32]]:
        ranks = np.tile(np.arange(each, dtype=np.int32), n_features)
        return {"feature": np.repeat(np.arange(n_features, dtype=np.int32), each), "rank": ranks}

    shown, n_tokens = tokens(20), EXAMPLES * EXAMPLE_TOKENS
    studies: Mapping[str, Mapping[str, Any]] = {
        "features": {"feature": keys(1)["feature"], "top_token": words[tokens(1)], "nearest_cosine": numbers(1)},
        "examples": {
            **keys(EXAMPLES), "kind": ["top"] * EXAMPLES * n_features, "quantile": numbers(EXAMPLES, np.float64),
            "activation": numbers(EXAMPLES), "tokens": lists(tokens(n_tokens)), "activations": lists(numbers(n_tokens)),
            "effects": lists(numbers(n_tokens)),
        },
        "histograms": {**keys(58), **{f"{end}_activation": numbers(58, np.float64) for end in ("from", "to")}},
        "logits": {**keys(20), "direction": ["raised", "lowered"] * 10 * n_features, "token_id": shown,
                   "token": words[shown], "effect": numbers(20)},
        "neighbours": {**keys(5), "neighbour": tokens(5), "cosine": numbers(5)},
        "neurons": {**keys(8), "neuron": tokens(8), "weight": numbers(8), "share": numbers(8)},
        "vocabulary": {"token_id": np.arange(D_VOCAB, dtype=np.int32), "token": words},
    }  # fmt: skip
    found = {"case_studies": {name: pa.table(dict(columns)) for name, columns in studies.items()}}
    for name, n_columns in COLUMNS.items():
        said = {name if number == 0 else f"{name}_{number}": numbers(1, np.float64) for number in range(n_columns)}
        found[name] = {"features": pa.table({"feature": keys(1)["feature"], **said})}
    sections = [Section(name, "analyze-0123456789ab", {}, AnalysisResult({}, tables)) for name, tables in found.items()]
    return ReportInputs("title", "preset", {}, [], sections)


def main() -> None:
    """Writes a small one, so that what is loaded once does not count, then the one asked for."""
    write_report(inputs(64))
    given = inputs(int(sys.argv[1]))
    n_bytes = sum(table.nbytes for section in given.sections for table in section.result.tables.values())
    before = resident_bytes()
    files = write_report(given)
    written = sum(map(len, files.values()))
    print(json.dumps({"tables": n_bytes, "files": written, "grown": peak_bytes() - before}))


if __name__ == "__main__":
    main()
