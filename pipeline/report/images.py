"""Static images of figures, for papers and slides: kaleido draws each in the system's Chromium, without the network.

Kaleido is an optional package (``pip install 'sparsemill[images]'``), since it is of no use without a browser.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from pipeline.analysis import figures
from storage.errors import ConfigError

Format = Literal["svg", "png", "pdf"]
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_WIDTH, _PNG_SCALE = 760, 2


class Image(NamedTuple):
    """A figure, and the file that it becomes."""

    figure: go.Figure
    path: Path


def write_images(images: Sequence[Image], kind: Format) -> None:
    """Draws figures in light colours on white.

    Args:
        images: which, and where to.
        kind: of file.

    Raises:
        ConfigError: kaleido, or a browser for it, is missing.
    """
    kaleido = _kaleido()
    scale = _PNG_SCALE if kind == "png" else 1
    specs: list[dict[str, Any]] = []
    for image in images:
        layout: Any = image.figure.layout
        size = {"width": _WIDTH, "height": int(layout.height or 380), "scale": scale}
        specs.append({"fig": _on_white(image.figure), "path": image.path, "opts": size | {"format": kind}})
    options = {"mathjax": False, "path": browser(), "headless": True}
    for folder in {image.path.parent for image in images}:
        folder.mkdir(parents=True, exist_ok=True)
    kaleido.write_fig_from_object_sync(specs, kopts=options)


def browser() -> str:
    """The browser that draws: ``BROWSER_PATH``, or the first of the usual ones.

    Raises:
        ConfigError: there is none.
    """
    named = os.environ.get("BROWSER_PATH")
    found = named or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None or shutil.which(found) is None:
        raise ConfigError(
            "images are drawn by a browser, and there is none", found=named, expected=f"one of {', '.join(_BROWSERS)}",
            remedy="'apt-get install chromium', or set BROWSER_PATH; each figure of a report also saves itself as SVG",
        )  # fmt: skip
    return found


def _kaleido() -> Any:
    try:
        import kaleido
    except ImportError as error:
        raise ConfigError(
            "images are drawn by kaleido, which is not installed", remedy="pip install 'sparsemill[images]'"
        ) from error
    return kaleido


def _on_white(figure: go.Figure) -> go.Figure:
    copy = go.Figure(figure)
    copy.update_layout(template=figures.template(figures.LIGHT), paper_bgcolor="white", plot_bgcolor="white")
    return copy
