"""All that may be done, and how often."""

from collections.abc import Callable

from tests.faults.soak import damaging, looking, making, sharing, tidying
from tests.faults.soak.model import Soak

Action = Callable[[Soak], None]
ACTIONS: dict[Action, int] = {
    making.make: 12, making.make_with_remote: 4, making.make_two_at_once: 2,
    looking.list_all: 1, looking.show: 1, looking.explain: 1, looking.foresee: 1, looking.read_report: 1,
    damaging.damage: 3, damaging.damage_unfinished: 2, damaging.damage_remote: 1,
    damaging.check_one: 2, damaging.repair: 3, damaging.heal: 3,
    sharing.push: 3, sharing.pull: 3, sharing.pull_sample: 2, sharing.export_import: 3,
    tidying.tag: 2, tidying.prune: 2,
}  # fmt: skip
"""Actions, and how often each is taken, by comparison; in this order each is taken once at first."""


def step(soak: Soak, action: Action | None = None) -> None:
    """One action; which one, chance says where it is not given."""
    done = action or soak.rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
    soak.counts[done.__name__] += 1
    done(soak)
