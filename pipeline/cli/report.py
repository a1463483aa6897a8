"""``sparsemill report``: look at reports, compare autoencoders, and save figures as images."""

import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from pipeline.cli.options import AFTERWARDS, DEFAULTS, Home, Run, finish, workspace_at
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import ConfigError

report = App(
    name="report",
    help="Look at reports. 'sparsemill analyze' and 'sparsemill replicate' write them.",
    group=AFTERWARDS,
    sort_key=1,
)

Reference = Annotated[
    str, Parameter(help="a report, or what was reported on: id, unique prefix, tag, path or 'latest'")
]


@report.command(name="open")
def open_report(reference: Reference = "latest", *, home: Home = None) -> None:
    """Open a report in the browser, and print its path."""
    page = _find(reference, workspace_at(None, home)).folder.resolve() / "index.html"
    print(page)
    webbrowser.open(page.as_uri())


@report.command
def serve(
    reference: Reference = "latest",
    *,
    port: Annotated[int, Parameter(help="0 takes a free one")] = 8000,
    home: Home = None,
) -> None:
    """Serve a report to this machine's browsers until Ctrl-C, and print its address.

    Every report of the store is served, since a comparison links to others.
    """
    artifact = _find(reference, workspace_at(None, home))
    handler = partial(_Quiet, directory=str(artifact.folder.resolve().parent))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ConfigError("the port cannot be had", found=port, remedy="--port 0 takes a free one") from error
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]}/{artifact.folder.name}/index.html", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@report.command
def images(
    reference: Reference = "latest",
    *,
    format_: Annotated[Literal["svg", "png", "pdf"], Parameter(name="--format", help="svg, png or pdf")] = "svg",
    folder: Annotated[Path | None, Parameter(help="where to; figures-ID in the current one by default")] = None,
    home: Home = None,
) -> None:
    """Save every figure of a report as an image, and print the files."""
    from pipeline import analyzing, reporting
    from pipeline.report.images import Image, write_images

    workspace = workspace_at(None, home)
    artifact = _find(reference, workspace)
    target = Path(f"figures-{artifact.id}") if folder is None else folder
    drawn = [
        Image(figure, target / f"{name}-{title}.{format_}")
        for name, finding in reporting.findings_of(artifact, workspace).items()
        for title, figure in analyzing.load_result(finding).figures.items()
    ]
    write_images(drawn, format_)
    for image in drawn:
        print(image.path)


@report.command
def compare(sae: str, *others: str, run: Run = DEFAULTS) -> None:
    """Put autoencoders side by side: settings, headline tables, every analysis that all have, and matched features.

    Analyses and reports that are missing are made first, with the preset's analyses.

    Args:
        sae: an autoencoder: id, unique prefix, tag, path or 'latest'.
        others: those beside it, at least one.
    """
    from pipeline import reporting
    from pipeline.training import AUTOENCODER_STAGES

    chain = run.chain()
    found = [chain.workspace.store.resolve(one, stage=AUTOENCODER_STAGES) for one in (sae, *others)]
    if len({one.id for one in found}) < max(2, len(found)):
        raise ConfigError(
            "a comparison takes two different autoencoders or more", found=", ".join(one.id for one in found),
            remedy="'sparsemill artifacts ls train' lists those there are",
        )  # fmt: skip
    reports = [chain.report(one) for one in found]
    matches = None
    if len({facts(one)["d_in"] for one in found}) == 1:
        matches = chain.analyze(found[0], ["cross_seed"], found[1:])["cross_seed"]
    finish(chain.stage("compare", lambda: reporting.compare(reports, matches, chain.workspace)))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's names
        """Keeps requests off the terminal."""


def _find(reference: str, workspace: Workspace) -> Artifact:
    """A report; of another artifact, the newest report made from it."""
    if reference == "latest":
        return workspace.store.resolve(reference, stage="report")
    artifact = workspace.store.resolve(reference)
    if artifact.stage == "report":
        return artifact
    for made in workspace.store.list("report"):
        if any(parent.id == artifact.id for parent in made.parents.values()):
            return made
    raise ConfigError(
        "there is no report on this", where=artifact.id, remedy=f"'sparsemill analyze {artifact.id}' makes one"
    )
