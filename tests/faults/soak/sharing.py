"""Actions that share: push, pull, samples, exports and imports."""

import shutil

from tests.faults.soak.hashes import hashed
from tests.faults.soak.model import Soak
from tests.faults.soak.processes import Broken
from tests.faults.soak.questions import Passing, told

_DENSITIES = {"densities.safetensors", "sparsity.safetensors"}
"""Exported only where densities were analysed."""


def push(soak: Soak) -> None:
    """``push``: the remote has it whole or not at all."""
    here = sorted(soak.here)
    if here:
        artifact_id, by_variable = soak.rng.choice(here), soak.rng.random() < 0.3
        parents, dry = soak.rng.random() < 0.4, soak.rng.random() < 0.1
        before = set(soak.there)
        words = [soak.name(artifact_id), *[str(soak.remote)] * (not by_variable)]
        words += ["--with-parents"] * parents + ["--dry-run"] * dry
        sure = not parents or soak.has_all_of([artifact_id])
        outcome = soak.run("push", *words, may_fail=not sure, remote=by_variable)
        meant = soak.golden.ancestors([artifact_id]) if parents else {artifact_id}
        _check_moved(soak.there.keys() - before, meant, set(soak.there), done=outcome.code == 0, dry=dry)
        soak.look()


def pull(soak: Soak) -> None:
    """``pull`` of what the remote has."""
    there = sorted(soak.there)
    if there:
        artifact_id = soak.rng.choice(there)
        parents, dry = soak.rng.random() < 0.4, soak.rng.random() < 0.1
        before = set(soak.here)
        words = [str(soak.remote), artifact_id, *["--with-parents"] * parents, *["--dry-run"] * dry]
        sure = not parents or soak.has_all_of([artifact_id], remote=True)
        outcome = soak.run("pull", *words, may_fail=not sure)
        meant = soak.golden.ancestors([artifact_id]) if parents else {artifact_id}
        _check_moved(soak.here.keys() - before, meant, set(soak.here), done=outcome.code == 0, dry=dry)
        soak.look()


def _check_moved(new: set[str], meant: set[str], now: set[str], *, done: bool, dry: bool) -> None:
    if not new <= meant or (dry and new):
        raise Broken(f"{new} moved, not {meant}")
    if done and not dry and not meant <= now:
        raise Broken(f"{meant - now} did not move")


def pull_sample(soak: Soak) -> None:
    """``pull --windows``: an artifact of its own."""
    able = sorted(soak.golden.samples.keys() & soak.there.keys())
    if able:
        harvest = soak.rng.choice(able)
        outcome = soak.run("pull", str(soak.remote), harvest, "--windows", "50%")
        sample = soak.golden.samples[harvest]
        if outcome.code == 0 and (told(outcome.stdout) != sample or sample not in soak.here):
            raise Broken(f"a sample of {harvest} is {outcome.stdout}, not {sample}")
        soak.look()


def export_import(soak: Soak) -> None:
    """``export`` to a new folder and ``import`` from there: files, and what they make, are as at first."""
    able = [one for one in soak.golden.passing if soak.has_all_of([one.reference, *one.needs])]
    if able:
        passing, place = soak.rng.choice(able), soak.folder / "exported"
        shutil.rmtree(place, ignore_errors=True)
        exported = soak.run(*passing.export(place))
        found = hashed(place) if place.is_dir() else {}
        if exported.code == 0 and not _as_at_first(found, passing):
            raise Broken(f"{passing.reference} was exported as {found}, not {passing.files}")
        whole = exported.code == 0 or _as_at_first(found, passing)
        taken = soak.run(*passing.take_in(place), may_fail=not whole)
        if taken.code == 0 and (told(taken.stdout) != passing.makes or passing.makes not in soak.here):
            raise Broken(f"an import of {passing.reference} made {taken.stdout}, not {passing.makes}")
        soak.look()


def _as_at_first(found: dict[str, str], passing: Passing) -> bool:
    return found.items() <= passing.files.items() and passing.files.keys() - found.keys() <= _DENSITIES
