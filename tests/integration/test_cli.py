import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sparsemill(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SPARSEMILL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_preset: Path) -> Path:
    home = tmp_path_factory.mktemp("home") / "store"
    done = sparsemill("replicate", "--preset", str(tiny_preset), home=home)
    assert done.returncode == 0, done.stderr
    for expected in (
        "tokenize-",
        "harvest-",
        "train-",
        "report-",
        "explained variance",
        "loss recovered",
        "index.html",
    ):
        assert expected in done.stdout
    return home


def test_artifacts_can_be_listed_shown_verified_tagged_and_traced(home: Path):
    listed = json.loads(sparsemill("artifacts", "ls", "--json", home=home).stdout)["artifacts"]
    assert {one["stage"] for one in listed} == {"tokenize", "harvest", "train", "survey", "analyze", "report"}
    (sae,) = [one["id"] for one in listed if one["stage"] == "train"]
    assert sae in sparsemill("artifacts", "ls", home=home).stdout
    shown = json.loads(sparsemill("artifacts", "show", sae[:10], home=home).stdout)
    assert shown["config"]["autoencoder"]["d_sae"] == 64
    assert sparsemill("artifacts", "tag", "mine", sae, home=home).stdout == f"mine -> {sae}\n"
    lineage = sparsemill("artifacts", "lineage", "mine", home=home).stdout
    assert [line.split("-")[0].strip() for line in lineage.splitlines()] == [
        "train", "activations: harvest", "tokens: tokenize",
    ]  # fmt: skip
    assert sparsemill("verify", "mine", home=home).returncode == 0


def test_explain_calls_no_stage_found_that_would_run(home: Path, tiny_preset: Path):
    done = sparsemill("explain", str(tiny_preset), "--set", "train.autoencoder.steps=3", home=home)
    assert "train: would run" in done.stdout
    assert "cached" not in done.stdout + done.stderr
    *_, changed, following = done.stdout.splitlines()
    assert changed.endswith(", has autoencoder.steps 60, not 3")
    assert following.startswith("survey, density, ")
    assert following.endswith(", report: would run, as train would")
    full = sparsemill("explain", str(tiny_preset), "--set", "train.autoencoder.steps=3", "--full", home=home)
    assert "\n  config.autoencoder.steps: 60 there, 3 wanted\n" in full.stdout
    assert "\nreport: would run; report-" in full.stdout


def test_tokenizing_few_held_out_prompts_is_warned_of(home: Path, tiny_preset: Path):
    done = sparsemill("tokenize", "--preset", str(tiny_preset), home=home)
    assert "warning: few held-out prompts: 37." in done.stderr
    assert done.stdout.startswith("tokenize-")
    assert len(done.stdout.splitlines()) == 1
    done = sparsemill("replicate", "--preset", str(tiny_preset), home=home)
    assert "\nwarning: few held-out prompts: 37." in done.stdout


def test_analyze_takes_any_reference_and_a_choice_of_analyses(home: Path, tiny_preset: Path):
    arguments = ("--only", "kurtosis", "--preset", str(tiny_preset))
    done = sparsemill("analyze", "latest", *arguments, home=home)
    assert done.returncode == 0, done.stderr
    report, page = done.stdout.splitlines()
    assert report.startswith("report-")
    assert Path(page).is_file()


def test_verify_finds_a_flipped_bit(home: Path, tmp_path: Path, tiny_preset: Path):
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(home, copy)
    (folder,) = (copy / "harvest").iterdir()
    shard = sorted((folder / "store.zarr" / "activations" / "c").rglob("0"))[3]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    done = sparsemill("verify", folder.name, home=copy)
    assert done.returncode == 1
    assert shard.relative_to(folder).as_posix() in done.stdout
    # Reading it is an error that names the shard, never wrong rows.
    done = sparsemill("train", "--preset", str(tiny_preset), "--set", "train.reader_seed=5", home=copy)
    assert done.returncode == 1
    assert shard.relative_to(folder).as_posix() in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("replicate", "--preset", "demmo"), "demo"),
        (("train", "--set", "train.autoencoder.l1_coef=1"), "nearest: l1_coeff"),
        (("analyze", "train-000000000000"), "no such artifact"),
        (
            ("tokenize", "--set", 'tokenize.sources=[{"name":"a","kind":"files","files":["/no/such.jsonl"]}]'),
            "nothing for source a",
        ),
        (("harvest", "--set", "harvest.hook_name=blocks.0.mlp.hook_pots"), "blocks.0.mlp.hook_post"),
        (("harvest", "--set", "harvest.window_prompts=1048576"), "too few training prompts"),
        (("harvest", "--device", "gpu"), "not a device"),
        (("harvest", "--device", "cuda:64"), "no such device"),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, tiny_preset: Path
):
    home = tmp_path / "store"
    if "--preset" not in arguments:
        arguments = (*arguments, "--preset", str(tiny_preset))
    done = sparsemill(*arguments, home=home)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(home.glob("harvest/*"))
    assert not list(home.glob("train/*"))


def test_bad_documents_stop_with_file_and_line_or_are_skipped_and_counted(tmp_path: Path, tiny_preset: Path):
    texts = tmp_path / "texts.jsonl"
    words = [f"word_{i}" for i in range(60)]
    lines = [json.dumps({"text": f"{a} {b} {a}"}) for a in words for b in words]
    texts.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    source = f'tokenize.sources=[{{"name":"a","kind":"files","files":["{texts}"]}}]'
    arguments = ("tokenize", "--preset", str(tiny_preset), "--set", source, "--set", "tokenize.train_tokens=2000")
    stopped = sparsemill(*arguments, home=tmp_path / "store")
    assert stopped.returncode == 1
    assert "texts.jsonl, line 2" in stopped.stderr
    skipped = sparsemill(*arguments, "--on-bad-document", "skip", home=tmp_path / "store")
    assert skipped.returncode == 0, skipped.stderr
    shown = json.loads(sparsemill("artifacts", "show", "latest", home=tmp_path / "store").stdout)
    assert shown["config"]["on_bad_document"] == "skip"
    assert sum(shown["stats"]["bad_documents"].values()) == 1


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path, tiny_preset: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    done = sparsemill("tokenize", "--preset", str(tiny_preset), home=tmp_path)
    assert done.returncode == 1
    assert "not an artifact store" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_that_does_not_fit_the_disk_is_refused_before_work(tmp_path: Path, tiny_preset: Path):
    code = "import storage.atomic, pipeline.cli\nstorage.atomic.free_bytes = lambda path: 1000\npipeline.cli.main()"
    environment = os.environ | {"SPARSEMILL_HOME": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "harvest", "--preset", str(tiny_preset)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1,000 bytes free" in done.stderr
    assert not list((tmp_path / "store").glob("harvest/*"))


def test_ctrl_c_says_how_to_go_on():
    code = (
        "from pipeline import cli\nfrom pipeline.cli import options\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "options.load_preset = stop\n"
        "cli.main()"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "harvest"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 130
    assert done.stderr == "sparsemill: interrupted; the same command continues where it stopped\n"


def test_the_command_line_never_imports_prefect():
    code = "import sys, pipeline.cli; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_the_version_is_the_package_s(tmp_path: Path):
    assert sparsemill("--version", home=tmp_path).stdout.strip() == version("sparsemill")


def test_help_names_every_command(tmp_path: Path):
    text = sparsemill("--help", home=tmp_path).stdout
    stages = ("tokenize", "harvest", "train", "analyze", "replicate")
    for command in (*stages, "plan", "verify", "artifacts", "presets", "hooks"):
        assert command in text
