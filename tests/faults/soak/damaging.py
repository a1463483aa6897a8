"""Actions that damage, and that find and mend damage."""

import shutil
from pathlib import Path

from tests.faults.soak.model import Soak
from tests.faults.soak.processes import Broken


def damage(soak: Soak) -> None:
    """A file of something committed, of each stage as often."""
    here = soak.here
    if here:
        stage = soak.rng.choice(sorted({name.partition("-")[0] for name in here}))
        artifact_id = soak.rng.choice(sorted(name for name in here if name.startswith(stage)))
        path = _any_file(soak, here[artifact_id])
        kind = _damage_here(soak, path)
        if kind == "remove" and path == here[artifact_id] / "manifest.json":  # no artifact any more
            soak.forget(artifact_id)
        soak.look()


def damage_unfinished(soak: Soak) -> None:
    """The same to work that a killed process left, and to what was fetched of the remote's."""
    left = [path for name in (".staging", ".pulled") for path in (soak.root / name).rglob("*") if path.is_file()]
    if left:
        _damage_here(soak, soak.rng.choice(sorted(left)))
        soak.counts["damage unfinished work"] += 1
        soak.look()


def _damage_here(soak: Soak, path: Path) -> str:
    """Damages a file under all its names: a longer harvest's windows, say, are links to a shorter one's."""
    here, fetched = soak.here, soak.root / ".pulled"
    names = [other for tree in (*here.values(), fetched) for other in tree.rglob("*") if other.samefile(path)]
    kind = soak.damage(path)
    for other in [path] if kind == "remove" else names:
        place, artifact_id, *_ = other.relative_to(soak.root).parts
        if place == ".pulled":
            soak.fetched_damaged.add(other)
        elif place != ".staging":
            soak.damaged.setdefault(artifact_id, set()).add(other.relative_to(here[artifact_id]).as_posix())
    for artifact_id in soak.here.keys() & soak.damaged.keys():  # a bit may be flipped back
        soak.damaged[artifact_id] &= soak.wrong(artifact_id)
    return kind


def damage_remote(soak: Soak) -> None:
    """The same to a file of the remote's, but for the pointer."""
    there = soak.there
    if there:
        artifact_id = soak.rng.choice(sorted(there))
        soak.damage(_any_file(soak, there[artifact_id]))
        soak.remote_damaged[artifact_id] = soak.wrong_there(artifact_id)
        soak.counts["damage remote"] += 1
        soak.look()


def _any_file(soak: Soak, folder: Path) -> Path:
    left_out = {folder / "run.json"}  # not hashed
    return soak.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path not in left_out))


def check_one(soak: Soak) -> None:
    """``verify``, here or in the remote: exit 1 just where something is damaged."""
    known = [(name, soak.damaged) for name in sorted(soak.here)]
    known += [(name, soak.remote_damaged) for name in sorted(soak.there)]
    if known:
        artifact_id, damaged = soak.rng.choice(known)
        stage = artifact_id.partition("-")[0]
        name = artifact_id if damaged is soak.damaged else f"{soak.remote.as_uri()}/{stage}/{artifact_id}"
        outcome = soak.run("verify", name, *soak.rng.choice([[], ["--json"]]), may_fail=True, faults=False)
        if outcome.code != bool(damaged.get(artifact_id)):
            raise Broken(f"verify {name}: exit {outcome.code}\n{outcome.stdout}{outcome.stderr}")


def repair(soak: Soak) -> None:
    """``verify --repair`` of something damaged: may be refused, never makes it worse, and is whole on exit 0."""
    damaged = sorted(name for name, files in soak.damaged.items() if files)
    if damaged:
        _repair(soak, soak.rng.choice(damaged), faults=True)


def _repair(soak: Soak, artifact_id: str, *, faults: bool) -> bool:
    rewrite = ["--rewrite"] if soak.rng.random() < 0.3 else []  # changes nothing where the same bytes come out
    by_variable = soak.rng.random() < 0.5
    where = [] if by_variable else ["--remote", str(soak.remote)]
    outcome = soak.run(
        "verify", artifact_id, "--repair", *where, *rewrite, faults=faults, may_fail=True, remote=by_variable
    )
    now = soak.wrong(artifact_id)
    if outcome.code == 0 and now:
        raise Broken(f"{artifact_id} repaired, but damaged: {now}")
    if not now <= soak.damaged[artifact_id]:
        raise Broken(f"a repair of {artifact_id} damaged {now - soak.damaged[artifact_id]}")
    soak.damaged[artifact_id] = now
    soak.counts["repaired"] += not now
    soak.look()
    return not now


def heal(soak: Soak) -> None:
    """Mends all that can be mended, which a harvest of whole parents must be; removes the rest by hand."""
    _heal_remote(soak)
    order = {"tokenize": 0, "harvest": 1}
    sampled = set(soak.golden.samples.values())
    for artifact_id in sorted(
        soak.damaged, key=lambda name: (order.get(name.partition("-")[0], 2), name in sampled, name)
    ):
        if not soak.damaged[artifact_id]:
            continue
        parents = soak.golden.parents[artifact_id]
        parents_whole = all(parent in soak.here and not soak.damaged.get(parent) for parent in parents)
        has_manifest = "manifest.json" not in soak.damaged[artifact_id]
        sure = artifact_id.startswith("harvest") and parents_whole and has_manifest
        if not _repair(soak, artifact_id, faults=False):
            if sure:
                raise Broken(f"{artifact_id} was not mended")
            shutil.rmtree(soak.here[artifact_id])
            soak.forget(artifact_id)
    soak.look()


def _heal_remote(soak: Soak) -> None:
    for artifact_id, files in soak.remote_damaged.items():
        if files:
            shutil.rmtree(soak.there[artifact_id].parent)
    soak.remote_damaged.clear()
    shutil.rmtree(soak.root / ".pulled", ignore_errors=True)
    soak.fetched_damaged.clear()
