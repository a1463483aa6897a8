"""What tells the artifacts of a list apart: when each was made, and which settings others of its kind have otherwise.

A kind is a stage, and of analyses each by its name. Settings that all artifacts of a kind have in common are left out,
so a list of one autoencoder names none and a sweep of l1_coeff names that alone. Cost: a small file an artifact beside
the manifest that was read already. Rejected: what differs from a preset (an artifact does not say which one it is of).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from storage.artifact import Artifact
from storage.explaining import differences
from storage.manifest import RUN_NAME, is_sha256

_MODEL = "config.model."
_MAX_RUN_BYTES = 1 << 20
_MOST_SHOWN = 4
_MOST_CHARACTERS = 32


@dataclass(frozen=True)
class RunRecord:
    """When an artifact came about, as far as its ``run.json`` says so; nothing vouches for that file.

    Attributes:
        finished: when it was made, or pulled.
        seconds: what that took; of a resumed one, since it was resumed.
        status: ``made``, ``resumed`` or ``pulled``.
    """

    finished: datetime | None = None
    seconds: float | None = None
    status: str = ""

    @property
    def day(self) -> str:
        """Local date and time, to the minute; "" where they are not known."""
        with suppress(OverflowError, OSError):  # a year before the first one, in this zone
            return "" if self.finished is None else f"{self.finished.astimezone():%Y-%m-%d %H:%M}"
        return ""


def run_record(artifact: Artifact) -> RunRecord:
    """What is known of the run that an artifact is from; of one in a remote, nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with (artifact.folder / RUN_NAME).open("rb") as file:
            run: dict[str, Any] = json.loads(file.read(_MAX_RUN_BYTES))
        seconds = run.get("seconds")
        return RunRecord(
            datetime.fromisoformat(run["finished"]),
            float(seconds) if isinstance(seconds, int | float) else None,
            str(run.get("status", "")),
        )
    return RunRecord()


def settings_apart(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Of each artifact the settings that others of its kind have otherwise, and the parent that tells it apart.

    Args:
        artifacts: of any stages.

    Returns:
        In their order; an analysis also has its name, as ``analysis``. Names are the config's, without their sections
        where that is enough; a parent stands under its role.
    """
    kinds: dict[tuple[str, object], list[int]] = {}
    for number, artifact in enumerate(artifacts):
        kinds.setdefault((artifact.stage, artifact.config.get("analysis")), []).append(number)
    found: list[dict[str, Any]] = [{} for _ in artifacts]
    for (_, analysis), numbers in kinds.items():
        alike = [artifacts[number] for number in numbers]
        for number, settings in zip(numbers, _apart(alike), strict=True):
            found[number] = ({} if analysis is None else {"analysis": analysis}) | settings
    return found


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in a line, the first few of them."""
    words = [_text(value) if name == "analysis" else f"{name} {_text(value)}" for name, value in settings.items()]
    more = len(words) - _MOST_SHOWN
    return ", ".join(words if more <= 1 else [*words[:_MOST_SHOWN], f"{more} more"])


def _apart(alike: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Of artifacts of one kind."""
    first, *others = alike
    changes = [{one.field: one for one in differences(first.spec, other.spec)} for other in others]
    fields = {name: change.there for changed in changes for name, change in changed.items()}
    models = _model_names(alike)
    apart = {"parents.", *([_MODEL] if models else [])}
    config = sorted(
        (name for name in fields if not name.startswith(tuple(apart))), key=lambda name: _rank(fields[name])
    )
    named = _short_names(config)
    found: list[dict[str, Any]] = []
    for number, changed in enumerate([{}, *changes]):
        values = {name: changed[name].wanted if name in changed else fields[name] for name in config}
        model = {"language_model": models[number]} if models else {}
        settings = {named[name]: value for name, value in values.items() if value is not None}
        found.append(model | settings | _parent_apart(alike[number], alike))
    return found


def _parent_apart(artifact: Artifact, alike: Sequence[Artifact]) -> dict[str, Any]:
    """The first parent that is not the same one of all, the autoencoder before what was found of it."""
    for role, parent in sorted(artifact.parents.items(), key=lambda one: one[0] != "sae"):
        if any(other.parents.get(role, parent).id != parent.id for other in alike):
            return {role: parent.id}
    return {}


def _model_names(alike: Sequence[Artifact]) -> list[str]:
    """A harvest is of a model's hashes, who looks knows its name: those of all, where they tell any apart."""
    names = [str(artifact.stats.get("language_model", "")).rpartition("/")[2] for artifact in alike]
    return names if len(set(names)) > 1 and all(names) else []


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    last = [name.rpartition(".")[2] for name in fields]
    return {
        name: short if last.count(short) == 1 else name.removeprefix("config.")
        for name, short in zip(fields, last, strict=True)
    }


def _rank(value: object) -> int:
    """What a person reads stands before hashes."""
    return 1 if isinstance(value, str) and is_sha256(value) else 0


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    if is_sha256(text):
        return text[:8]
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
