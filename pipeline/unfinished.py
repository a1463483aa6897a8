"""How far unfinished work has come, in the units of its stage; its folder is all that is looked at."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from storage.manifest import Spec
from storage.unfinished import Unfinished


@dataclass(frozen=True)
class SoFar:
    """What of a stage's work is kept: whoever goes on begins behind it.

    Attributes:
        done: units that are finished.
        of: units in all, of a tokenizing at most; None where that is not known at once.
        unit: what is counted.
    """

    done: int
    of: int | None
    unit: str

    def __str__(self) -> str:
        if self.of is None and not self.done:
            return "nothing yet"
        return f"{self.done:,} {'' if self.of is None else f'of {self.of:,} '}{self.unit}"


def so_far(work: Unfinished) -> SoFar | None:
    """How far something unfinished is; None where its journal does not tell."""
    return None if work.spec is None else counted(work.spec, work.units)


def counted(spec: Spec, units: Collection[str]) -> SoFar:
    """How far work on a question is whose finished units are these."""
    with suppress(KeyError, TypeError, ValueError, ArithmeticError):  # a version that recorded something else
        return _so_far(spec.stage, units, cast("Any", spec.config))
    return SoFar(len(units), None, "parts")


def _so_far(stage: str, units: Collection[str], config: Mapping[str, Any]) -> SoFar:
    from pipeline.surveying import SURVEY  # torch and all, for which a list of artifacts need not wait

    if stage == "harvest":
        return SoFar(len(units), int(config["n_windows"]), "windows")
    if stage == "tokenize":
        return SoFar(len(units), sum(_rounds(config, split) for split in ("train", "held_out")), "rounds")
    if stage == "train":
        steps = int(config["autoencoder"]["steps"])
        return SoFar(steps if "result" in units else _newest(units), steps, "steps")
    if stage == "survey":
        return SoFar(1, 1, "passes") if SURVEY in units else SoFar(_newest(units), None, "rows")
    return SoFar(len(units), None, "parts")


def _rounds(config: Mapping[str, Any], split: str) -> int:
    from pipeline.tokenizing import PROMPTS_PER_ROUND  # as above

    wanted, length = int(config[f"{split}_tokens"]), int(config["prompt_tokens"])
    prompts = sum(round(wanted * float(source["share"])) // length for source in config["sources"])
    return -(-prompts // PROMPTS_PER_ROUND)


def _newest(units: Collection[str]) -> int:
    """The largest number in the names of checkpoints, such as ``checkpoint-000000500``; 0 where there is none."""
    return max((int(unit.partition("-")[2].partition(".")[0]) for unit in units), default=0)
