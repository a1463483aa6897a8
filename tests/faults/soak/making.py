"""Actions that make: every stage of every run, studies, comparisons; alone, with a team's cache, two at once."""

from tests.faults.soak.model import Soak
from tests.faults.soak.processes import Broken, Outcome
from tests.faults.soak.questions import Question, told


def begin(soak: Soak) -> None:
    """One whole run, pushed: so that the first of each action has something to act on."""
    preset, settings = soak.golden.chains[0]
    report = told(soak.run("replicate", "--preset", preset, "--threads", "1", *settings, faults=False).stdout)
    soak.run("push", report, str(soak.remote), "--with-parents", faults=False)
    soak.look()


def make(soak: Soak) -> None:
    """Any question, and what it needs."""
    _ask(soak, soak.rng.choice(list(soak.golden.answers)))


def make_with_remote(soak: Soak) -> None:
    """The same with ``SPARSEMILL_REMOTE``: what is there is not made again; with ``--push`` it is there afterwards."""
    question = soak.rng.choice(list(soak.golden.answers))
    push = soak.rng.random() < 0.5
    words = [*question.words, *["--push"] * push]
    sure = soak.has_all_of(question.needs, remote=True)
    answer = soak.golden.answers[question]
    outcome = soak.run(*words, remote=True, may_fail=not sure)
    _check(soak, question, outcome)
    if outcome.code == 0 and answer not in soak.here.keys() | soak.there.keys():
        raise Broken(f"{words} made {answer}, which is neither here nor in the remote")
    if outcome.code == 0 and push and answer not in soak.there:
        raise Broken(f"{words} did not push {answer}")
    soak.look()


def make_two_at_once(soak: Soak) -> None:
    """Two questions, or one twice, at the same time; one may be killed."""
    one = soak.rng.choice(list(soak.golden.answers))
    other = soak.rng.choice([one, soak.rng.choice(list(soak.golden.answers))])
    commands = [soak.start(*one.words, faults=False), soak.start(*other.words)]
    for question, command in zip((one, other), commands, strict=True):
        outcome = soak.finish(command, may_fail=not soak.has_all_of(question.needs))
        _check(soak, question, outcome)
    soak.look()


def _ask(soak: Soak, question: Question) -> None:
    outcome = soak.run(*question.words, may_fail=not soak.has_all_of(question.needs))
    _check(soak, question, outcome)
    if outcome.code == 0 and soak.golden.answers[question] not in soak.here:
        raise Broken(f"{question.words} did not make {soak.golden.answers[question]}")
    soak.look()


def _check(soak: Soak, question: Question, outcome: Outcome) -> None:
    if outcome.code == 0 and told(outcome.stdout) != soak.golden.answers[question]:
        raise Broken(f"{question.words} told of {outcome.stdout}, not of {soak.golden.answers[question]}")


def complete(soak: Soak) -> None:
    """Asks for everything, without faults: all can be made in the end."""
    for question in soak.golden.answers:  # all: its answer may be here, and others that it made pruned
        _provide(soak, question)
        soak.run(*question.words, faults=False)
    for harvest, sample in soak.golden.samples.items():
        _sample(soak, harvest, sample)
    for number, passing in enumerate(soak.golden.passing):
        if not soak.has_all_of([passing.makes]):
            _pass_on(soak, number)
    soak.look()
    if missing := soak.golden.files.keys() - soak.here.keys():
        raise Broken(f"missing in the end: {missing}")


def _provide(soak: Soak, question: Question) -> None:
    """What a question names, where only ``pull`` or ``import`` can make it."""
    for harvest, sample in soak.golden.samples.items():
        if sample in question.needs:
            _sample(soak, harvest, sample)
    for number, passing in enumerate(soak.golden.passing):
        if passing.makes in question.needs and not soak.has_all_of([passing.makes]):
            _pass_on(soak, number)


def _sample(soak: Soak, harvest: str, sample: str) -> None:
    if not soak.has_all_of([sample]):
        soak.run("push", harvest, str(soak.remote), "--with-parents", faults=False)
        soak.run("pull", str(soak.remote), harvest, "--windows", "50%", faults=False)


def _pass_on(soak: Soak, number: int) -> None:
    passing, place = soak.golden.passing[number], soak.folder / f"in-the-end-{number}"
    soak.run(*passing.export(place), faults=False)
    soak.run(*passing.take_in(place), faults=False)
