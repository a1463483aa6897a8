"""Actions that only look: what they say is compared with the model, and nothing is changed by them."""

import hashlib
import json
import urllib.request
from typing import Any

from pipeline.config import load_preset
from tests.faults.soak.model import Soak
from tests.faults.soak.processes import Broken, Command, Outcome
from tests.faults.soak.questions import told


def list_all(soak: Soak) -> None:
    """``artifacts ls``, of the store and of the remote, ``du`` and a ``prune`` that only lists."""
    for where, known in ((None, soak.here), (soak.remote, soak.there)):
        words = ["artifacts", "ls", *([] if where is None else [str(where)])]
        soak.run(*words, faults=False)
        listed = _json(soak.run(*words, "--json", faults=False))
        if listed is not None:
            found = {one["id"] for one in (listed["artifacts"] if where is None else listed)}
            if found != known.keys():
                raise Broken(f"artifacts ls {where or ''} lists {found}, not {known.keys()}")
    soak.run("artifacts", "du", *soak.rng.choice([[], ["--json"]]), faults=False)
    soak.run("artifacts", "prune", "--older-than", "0", faults=False)
    soak.look()


def show(soak: Soak) -> None:
    """``artifacts show`` and ``lineage`` of one of them by any of its names."""
    here = sorted(soak.here)
    if here:
        artifact_id = soak.rng.choice(here)
        for word in ("show", "lineage"):
            outcome = soak.run("artifacts", word, soak.name(artifact_id), faults=False)
            if outcome.code == 0 and artifact_id not in outcome.stdout:
                raise Broken(f"artifacts {word} {artifact_id} says {outcome.stdout}")


def explain(soak: Soak) -> None:
    """``explain``, alone or with a team's cache: where each stage is."""
    preset, settings = soak.rng.choice(soak.golden.chains)
    remote = soak.rng.random() < 0.3
    overrides = [word for word in settings if word not in {"--on-bad-document", "skip"}]
    outcome = soak.run("explain", preset, *overrides, "--json", faults=False, remote=remote)
    for answer in _json(outcome) or []:
        named = answer["id"]
        place = "here" if named in soak.here else "remote" if remote and named in soak.there else None
        if answer["place"] != place and soak.all_whole:
            raise Broken(f"explain {preset} says that {named} is {answer['place']}, and it is {place}")
    soak.run("explain", preset, *overrides, faults=False, remote=remote)


def foresee(soak: Soak) -> None:
    """``plan``, ``presets``, ``hooks`` and a study's ``--dry-run``, which make nothing."""
    before = soak.here.keys()
    preset, settings = soak.rng.choice(soak.golden.chains[:-1])
    calibrated = soak.rng.choice(["--calibration", "--no-calibration"])
    plan = ["plan", preset, *settings, calibrated, "--tokens", "100000", "--memory-gib", "8"]
    soak.run(*plan, "--threads", "1", "--json", faults=False)
    study = soak.rng.choice(
        [["cross-seed"], ["encoder-sparsity"], ["orthogonal-rerun", "--features", "0"], ["site-comparison"]]
    )
    soak.run("study", *study, "--preset", preset, *settings, "--dry-run", faults=False)
    model = load_preset(preset).harvest.language_model
    for words in (["presets"], ["presets", "demo"], ["hooks", model]):
        soak.finish(Command(words))
    if soak.here.keys() != before:
        raise Broken(f"foreseeing made {soak.here.keys() - before}")


def read_report(soak: Soak) -> None:
    """``report open``, and ``report serve``, whose page is what was committed, until a signal."""
    reports = sorted(name for name in soak.here if name.startswith("report"))
    if not reports:
        return
    report = soak.rng.choice(reports)
    outcome = soak.run("report", "open", soak.name(report), faults=False)
    if outcome.code == 0 and told(outcome.stdout) != report:
        raise Broken(f"report open {report} says {outcome.stdout}")
    if soak.damaged.get(report):
        return
    server = soak.start("report", "serve", report, "--port", "0", faults=False)
    server.wait(lambda printed: "\n" in printed)
    with urllib.request.urlopen(server.printed.strip()) as page:
        digest = hashlib.sha256(page.read()).hexdigest()
    server.interrupt()
    soak.finish(server)
    if digest != soak.golden.files[report]["index.html"]:
        raise Broken(f"report serve {report} gave a page of sha256 {digest}")


def _json(outcome: Outcome) -> Any:
    return json.loads(outcome.stdout) if outcome.code == 0 else None
