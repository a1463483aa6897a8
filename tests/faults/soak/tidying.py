"""Actions that tidy: tags and pruning."""

import json

from tests.faults.soak.model import Soak
from tests.faults.soak.processes import Broken


def prune(soak: Soak) -> None:
    """``artifacts prune --yes``: what has a tag, and what that was made from, stays."""
    before = set(soak.here)
    soak.run("artifacts", "prune", "--older-than", "0", "--yes")
    gone = before - soak.here.keys()
    if needed := gone & soak.golden.ancestors(soak.tags.values(), before):
        raise Broken(f"pruned although needed: {needed}")
    for artifact_id in gone:
        soak.forget(artifact_id)
    soak.counts["pruned"] += len(gone)
    soak.look()


def tag(soak: Soak) -> None:
    """Moves one of two tags."""
    here = sorted(name for name in soak.here if not soak.damaged.get(name))
    if here:
        name, artifact_id = soak.rng.choice(["best", "first"]), soak.rng.choice(here)
        outcome = soak.run("artifacts", "tag", name, soak.name(artifact_id))
        path, before = soak.root / ".tags" / name, soak.tags.get(name)
        now = json.loads(path.read_bytes())["id"] if path.is_file() else None
        if now not in {before, artifact_id} or (outcome.code == 0 and now != artifact_id):
            raise Broken(f"tag {name} is {now}, was {before}, to be {artifact_id}")
        if now is not None:
            soak.tags[name] = now
