"""The covariance of neurons, computed out of core on a Dask cluster: out-of-core work of your own on a shared store.

    python examples/covariance_on_a_cluster.py latest --workers 2          # processes of this machine
    python examples/covariance_on_a_cluster.py latest --dask tcp://host:8786

``activations.dask()`` is a lazy array whose blocks are the store's shards, so that each file is read once, by one
worker. Each block gives a sum and a matrix of products, float64 (d_in, d_in); they are added up in a tree, on the
workers, and one matrix comes back. The reader opens the store by path: workers see the artifact root where this
process does.
"""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import dask
import numpy as np
from distributed import Client, LocalCluster

import sparsemill


def covariance(activations: sparsemill.ShardReader, rows: int | None = None) -> np.ndarray:
    """Covariance of the neurons over rows of a store, float64 (d_in, d_in), on the cluster of the current client.

    Args:
        activations: the store.
        rows: the first so many of the store, which is shuffled; all by default.
    """
    blocks = activations.dask()[:rows].astype(np.float64)
    n_rows = len(blocks)
    total, products = dask.compute(blocks.sum(axis=0), blocks.T @ blocks)
    mean = total / n_rows
    return (products - n_rows * np.outer(mean, mean)) / (n_rows - 1)


def cluster_of(address: str | None, workers: int) -> AbstractContextManager[str | LocalCluster]:
    """A given scheduler's address, or processes of this machine, for a ``with`` block."""
    if address is not None:
        return nullcontext(address)
    return LocalCluster(n_workers=workers, dashboard_address="127.0.0.1:0")


def main(arguments: Sequence[str] | None = None) -> np.ndarray:
    """Prints what the covariance says of the neurons, and returns it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("activations", nargs="?", default="latest", help="a harvest: id, prefix, tag or 'latest'")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dask", help="address of a scheduler")
    where.add_argument("--workers", type=int, default=2, help="processes of this machine")
    options = parser.parse_args(arguments)

    activations = sparsemill.open_activations(options.activations)
    with cluster_of(options.dask, options.workers) as cluster, Client(cluster) as client:
        found = covariance(activations)
        print(f"{activations.n_rows:,} rows of {activations.d_in} neurons on {len(client.nthreads())} workers")

    variance = np.diag(found)
    eigenvalues = np.linalg.eigvalsh(found)
    print(
        f"total variance {variance.sum():.4f}; the most varied neuron has {variance.max() / variance.sum():.1%} of it"
    )
    print(f"directions for half of it: {int((np.cumsum(eigenvalues[::-1]) < variance.sum() / 2).sum()) + 1}")
    return found


if __name__ == "__main__":
    main()
