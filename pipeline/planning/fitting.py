"""What a planned run lacks, and every way out with what it would need.

A run that does not fit is refused before it begins. Nothing is shrunk on its own: encoding, site, windows and tokens
are content, so each choice is the user's, named with the setting that makes it and planned like the run itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.memory import described, size, smaller_windows
from pipeline.planning.sizes import Figures, Site, Subject
from storage.errors import MemoryBudgetExceeded, SparsemillError, StorageFull
from storage.order import MIN_POOL_CHUNKS


class Choice(Figures):
    """A way to need less disk."""

    settings: str
    """What to set."""
    note: str = ""
    """What else it changes."""
    bytes: int
    """What the run would then add to the disk."""


def disk_choices(subject: Subject, narrow: Site | None, free_bytes: int) -> list[Choice]:
    """Ways to need less disk.

    Args:
        subject: what is planned.
        narrow: the MLP's output at the same layer, where that is narrower.
        free_bytes: what the disk has, for the number of tokens that fit.
    """
    choices: list[Choice] = []
    sites = [("", "", subject)]
    if narrow is not None:
        note = f"another site, {narrow.d_in} wide"
        sites.append((f"harvest.hook_name={narrow.hook_name}", note, subject.at(narrow)))
    for setting, note, other in sites:
        if setting:
            choices.append(Choice(settings=setting, note=note, bytes=other.plan().disk_bytes))
        if subject.preset.harvest.encoding != "uint8":
            uint8 = other.changed(harvest={"encoding": "uint8"}).plan()
            settings = f"{setting} harvest.encoding=uint8".strip()
            choices.append(Choice(settings=settings, note=note, bytes=uint8.disk_bytes))
    return [*choices, *_fewer_windows(subject, free_bytes), *_live(subject)]


def require_disk(subject: Subject, choices: Sequence[Choice], free_bytes: int, root: Path) -> None:
    """Refuses a run that does not fit the disk.

    Args:
        subject: what is planned.
        choices: ways out.
        free_bytes: what the disk has.
        root: the artifact store's folder.

    Raises:
        StorageFull: the stages not yet made need more.
    """
    needed = subject.plan().disk_bytes
    if needed > free_bytes:
        ways = [
            f"{choice.settings} ({', '.join(filter(None, [choice.note, f'needs {size(choice.bytes)}']))})"
            + ("" if choice.bytes <= free_bytes else " would not fit either")
            for choice in choices
        ]
        raise StorageFull(
            f"the run adds {size(needed)} to a disk that has {size(free_bytes)}",
            where=root,
            needed_bytes=needed,
            free_bytes=free_bytes,
            remedy=f"free some space, or choose: {'; '.join(ways)}",
        )


def require_room(subject: Subject, needs: Mapping[str, Mapping[str, int]], room_bytes: int) -> None:
    """Refuses a run of which a stage does not fit the memory.

    Args:
        subject: what is planned.
        needs: bytes by stage and part.
        room_bytes: what a stage may take beside the process with its model.

    Raises:
        MemoryBudgetExceeded: a stage not yet made needs more; names the settings that would fit.
    """
    errors = [
        _memory_error(subject, stage, parts, room_bytes)
        for stage, parts in needs.items()
        if stage not in subject.made and sum(parts.values()) > room_bytes
    ]
    for error in errors:
        raise error


def _memory_error(subject: Subject, stage: str, parts: Mapping[str, int], room_bytes: int) -> SparsemillError:
    if stage == "harvest":
        ways = smaller_windows(subject.layouts, parts, room_bytes)
    else:
        ways = _smaller_training(subject, parts, room_bytes)
    return MemoryBudgetExceeded(
        f"{stage} does not fit the memory",
        found=f"{size(room_bytes)} for it",
        expected=described(parts),
        remedy=f"choose: {'; '.join(ways)}",
    )


def _fewer_windows(subject: Subject, free_bytes: int) -> list[Choice]:
    """As many windows as fit; one at least, and fewer than there are."""
    windows = subject.layouts[0].n_windows
    if windows == 1:
        return []

    def needed(n_windows: int) -> int:
        return subject.changed(harvest={"n_windows": n_windows}).plan().disk_bytes

    one = needed(1)
    each = (needed(windows) - one) // (windows - 1)
    fit = min(max(1, 1 + (free_bytes - one) // each), windows - 1)
    tokens = fit * subject.layouts[0].window_prompts * subject.preset.tokenize.prompt_tokens
    return [Choice(settings=f"harvest.n_windows={fit}", note=f"{tokens:,} tokens", bytes=needed(fit))]


def _live(subject: Subject) -> list[Choice]:
    if subject.preset.train.source == "live":
        return []
    live = subject.changed(harvest={"n_windows": 1}, train={"source": "live"})
    settings = "train.source=live with harvest.n_windows=1"
    return [Choice(settings=settings, note="all tokens, less well mixed", bytes=live.plan().disk_bytes)]


def _smaller_training(subject: Subject, parts: Mapping[str, int], room_bytes: int) -> list[str]:
    batches = subject.batches()
    least = MIN_POOL_CHUNKS * batches.chunk_rows
    rest = sum(parts.values()) - parts["shuffling pools"]
    needed = rest + batches.pool_bytes(replace(subject.order, pool_rows=least))
    verdict = "" if needed <= room_bytes else " would not fit either"
    return [f"train.pool_rows={least} (needs {size(needed)}){verdict}", "a smaller train.autoencoder.d_sae"]
