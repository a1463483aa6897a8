"""The flow and deployment ``tokenize``."""

from typing import Any

from prefect import flow

from flows.runs import closing_state, open_chain


@flow(name="tokenize")
def tokenize(
    preset: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    threads: int | None = None,
) -> Any:
    """Tokenizes the preset's corpus into prompts.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
    """
    chain = open_chain(preset, overrides or [], root, threads)
    chain.tokenize()
    return closing_state(chain)
