"""What the flows share: a stage as a Prefect task, and the workspace and preset that a flow run works with.

Prefect orchestrates; the artifact store alone decides what is cached. So tasks have no cache policy, return an
artifact's id, and end in a state that says ``Cached`` or ``Resumed`` where that is what happened. A stage is tried
again where a remote said that the same may well succeed later, and only there: bad input and damage stay what they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal
from uuid import UUID

from prefect import get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import exponential_backoff

from flows.gpu import alone_on
from flows.story import Listener, reporter, tell_outcome
from pipeline.config import Runtime, load_preset, validate
from pipeline.stages import Chain
from pipeline.workspace import Workspace
from storage.artifacts import Made
from storage.errors import RemoteError, SparsemillError

Status = Literal["made", "cached", "resumed"]

_STATE_NAMES: dict[Status, str] = {"made": "Completed", "cached": "Cached", "resumed": "Resumed"}
_STATUSES: dict[str | None, Status] = {"Completed": "made", "Cached": "cached", "Resumed": "resumed"}
_RETRIES = 3
_FIRST_RETRY_SECONDS = 10


def may_succeed_later(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether what failed was a remote's trouble; Prefect asks it before it tries a stage again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RemoteError) and error.transient


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=_RETRIES,
    retry_delay_seconds=exponential_backoff(_FIRST_RETRY_SECONDS),
    retry_condition_fn=may_succeed_later,
)
def stage(work: Callable[[], Made]) -> Any:
    """Runs one stage; its state's message is the artifact's id, or what is wrong."""
    try:
        made = work()
    except SparsemillError as error:
        return Failed(message=str(error), data=error)
    return Completed(name=_STATE_NAMES[made.status], message=made.artifact.id, data=made.artifact.id)


def run_chain(
    work: Callable[[Chain], object], preset: str, overrides: Sequence[str], root: str | None, **runtime: Any
) -> Any:
    """A flow's whole work: its state says what it made, or what is wrong, in the error's words without a traceback.

    Args:
        work: what the flow asks of the chain.
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each.
        root: the artifact store's folder, or None for the usual one.
        runtime: further fields of ``Runtime``.
    """
    try:
        chain = open_chain(preset, overrides, root, **runtime)
        with alone_on(chain.workspace.runtime.device, get_current_settings().home, _say_waiting):
            work(chain)
        tell_outcome(chain)
    except SparsemillError as error:
        get_run_logger().error(str(error))
        return Failed(message=str(error), data=error)
    except TerminationSignal:
        if _is_being_cancelled():
            return Cancelled(message="Cancelled; the same run goes on where this one stopped.")
        raise
    return closing_state(chain)


def open_chain(preset: str, overrides: Sequence[str], root: str | None, **runtime: Any) -> Chain:
    """The chain of stages of a flow run, each run as a Prefect task; for arguments see :func:`run_chain`."""
    if root is not None:
        runtime["root"] = root
    workspace = Workspace.open(validate(Runtime, runtime, where="the run's parameters"), reporter())

    def run_as_task(name: str, work: Callable[[], Made]) -> Made:
        state = stage.with_options(name=name)(work)
        state.result()  # or raises the error that the stage failed with
        return Made(workspace.store.open(state.message), _STATUSES[state.name])

    return Chain(load_preset(preset, overrides), workspace, run_as_task)


def _say_waiting() -> None:
    get_run_logger().info("another run has the GPU: waiting for that one")


def _is_being_cancelled() -> bool:
    """Whether somebody asked for it: a stage that put the signal off until it had saved hides that from Prefect."""

    def read() -> State[Any] | None:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(flow_run.id)).state

    state = Listener().ask(read)
    return state is not None and state.is_cancelling()


def closing_state(chain: Chain) -> State[Any]:
    """The flow's own state: ``Cached`` where every stage was found, ``Resumed`` where one went on with a part."""
    statuses = {run.made.status for run in chain.runs}
    name = "Resumed" if "resumed" in statuses else "Cached" if statuses == {"cached"} else "Completed"
    last = chain.runs[-1].made.artifact.id
    return Completed(name=name, message=last, data=last)
