"""How long the fault suite looks: a few cases of each fault in ``make test``, many where SPARSEMILL_FAULTS=long."""

import os

LONG = os.environ.get("SPARSEMILL_FAULTS") == "long"


def times(short: int, long: int) -> int:
    """How many cases to try: a few, or in ``make test-faults`` many."""
    return long if LONG else short
