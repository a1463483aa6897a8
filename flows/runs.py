"""What the flows share: a stage as a Prefect task, and the workspace and preset that a flow run works with.

Prefect orchestrates; the artifact store alone decides what is cached. So tasks have no cache policy, return an
artifact's id, and end in a state that says ``Cached`` or ``Resumed`` where that is what happened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from pipeline.config import Runtime, load_preset
from pipeline.progress import for_stderr
from pipeline.stages import Chain
from pipeline.workspace import Workspace
from storage.artifacts import Made

Status = Literal["made", "cached", "resumed"]

_STATE_NAMES: dict[Status, str] = {"made": "Completed", "cached": "Cached", "resumed": "Resumed"}
_STATUSES: dict[str | None, Status] = {"Completed": "made", "Cached": "cached", "Resumed": "resumed"}


@task(cache_policy=NO_CACHE, persist_result=False)
def stage(work: Callable[[], Made]) -> Any:
    """Runs one stage; its state's data is the artifact's id."""
    made = work()
    return Completed(name=_STATE_NAMES[made.status], message=made.artifact.id, data=made.artifact.id)


def open_chain(preset: str, overrides: list[str], root: str | None, threads: int | None, device: str = "cpu") -> Chain:
    """The chain of stages of a flow run, each run as a Prefect task."""
    runtime = Runtime(threads=threads, device=device)
    if root is not None:
        runtime = runtime.model_copy(update={"root": Path(root)})
    workspace = Workspace.open(runtime, for_stderr())

    def run_as_task(name: str, work: Callable[[], Made]) -> Made:
        state = stage.with_options(name=name)(work)
        return Made(workspace.store.open(state.message), _STATUSES[state.name])

    return Chain(load_preset(preset, overrides), workspace, run_as_task)


def closing_state(chain: Chain) -> Any:
    """The flow's own state: ``Cached`` where every stage was found."""
    cached = all(run.made.status == "cached" for run in chain.runs)
    last = chain.runs[-1].made.artifact.id
    return Completed(name="Cached" if cached else "Completed", message=last, data=last)
