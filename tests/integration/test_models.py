"""Language models by their real files: gelu-1l at its real size from a Hub cache, and every architecture harvested."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from pipeline import harvest, language_model, tokens
from pipeline.config import HarvestConfig, Preset, Runtime, load_preset
from pipeline.language_model import ForwardDtype, LanguageModel
from pipeline.model_files import HUB_NAMES
from pipeline.planning.plan import plan
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError
from storage.fingerprint import sha256_file
from storage.reader import ShardReader
from tests.integration.hub import Hub
from tests.model_folders import (
    ARCHITECTURES,
    DIGITS,
    GELU_1L,
    SETTINGS,
    TINY,
    as_pythia_was_published,
    files_of,
    random_weights,
    tokenizer_files,
    tokenizer_json,
)
from tests.transformers_by_hand import by_hand

ROOT = Path(__file__).parents[2]
POST = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of gelu-1l's size."""
    return random_weights(SETTINGS)


@pytest.fixture(scope="module")
def real_hub(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """A Hub that has gelu-1l at its real size."""
    root = tmp_path_factory.mktemp("remote")
    hub = Hub(root / "hub")
    hub.commit(GELU_1L, files_of(SETTINGS, weights, root / "files"))
    hub.commit(DIGITS, tokenizer_files())
    return hub


@pytest.fixture(scope="module")
def hub_cache(real_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder HF_HOME of somebody who has downloaded gelu-1l."""
    home = tmp_path_factory.mktemp("huggingface")
    for repository in (GELU_1L, DIGITS):
        real_hub.fill_cache(home / "hub", repository)
    return home


@pytest.fixture
def use_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets this process, which is offline, read another Hub cache."""

    def use(home: Path) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))

    return use


@pytest.fixture
def gelu_1l_in_cache(hub_cache: Path, use_cache: Callable[[Path], None]) -> None:
    use_cache(hub_cache)


def real_preset(folder: Path) -> Path:
    """A run on gelu-1l that takes a moment."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9))).decode() for _ in range(300)]
    texts = [" ".join(words[i] for i in rng.zipf(1.4, 20) % 300) for _ in range(1000)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "real.toml").write_text(f"""
description = "gelu-1l at its real size, for a moment"
[tokenize]
language_model = "gelu-1l"
prompt_tokens = 32
train_tokens = 2048
held_out_tokens = 128
sources = [{{ name = "words", kind = "files", files = ["{folder}/texts.jsonl"] }}]
[harvest]
language_model = "gelu-1l"
window_prompts = 32
chunk_rows = 16
[train]
pool_rows = 512
evaluate_every_steps = 5
evaluate_prompts = 2
[train.autoencoder]
d_sae = 1024
l1_coeff = 0.01
steps = 5
batch_rows = 256
density_window_rows = 512
[analyze]
analyses = ["density", "null_space", "loss_recovered"]
""")
    return folder / "real.toml"


@pytest.mark.usefixtures("gelu_1l_in_cache")
def test_gelu_1l_goes_through_the_whole_pipeline_at_its_real_size_offline(hub_cache: Path, tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=1), Quiet())
    chain = Chain(load_preset(str(real_preset(tmp_path))), workspace, run_directly)
    found = {name: facts(artifact)["numbers"] for name, artifact in chain.analyze(chain.train()).items()}
    stats, config = facts(chain.harvest()), chain.harvest().config
    commit = (hub_cache / "hub" / f"models--{GELU_1L.replace('/', '--')}" / "refs" / "main").read_text()
    assert (stats["language_model"], stats["language_model_commit"]) == ("gelu-1l", commit)
    assert (config["forward_dtype"], config["weight_processing"]) == ("float32", "none")
    assert config["model"] == language_model.identity(f"gelu-1l@{commit}")
    assert (stats["d_in"], stats["rows"], facts(chain.train())["d_sae"]) == (2048, 2 * 32 * 31, 1024)
    assert found["loss_recovered"]["n_prompts"] == 4
    # Random weights know nothing: each of 48262 tokens is about as likely as any other.
    assert found["loss_recovered"]["ce_clean"] == pytest.approx(math.log(48262), abs=1.5)


def test_gelu_1l_at_its_real_size_goes_through_online_and_all_of_it_is_found_again_offline(
    real_hub: Hub, hub_cache: Path, use_cache: Callable[[Path], None], tmp_path: Path
):
    preset, store = real_preset(tmp_path), tmp_path / "store"
    command = [sys.executable, "-m", "pipeline.cli", "analyze", "--preset", str(preset), "--home", str(store)]
    with real_hub.served() as environment:
        merged = os.environ | environment | {"HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any("model_final.pth" in request and "GET" in request for request in real_hub.requests)
    made = {one.id for one in Workspace.open(Runtime(root=store), Quiet()).store.list()}
    use_cache(hub_cache)
    chain = Chain(load_preset(str(preset)), Workspace.open(Runtime(root=store, threads=1), Quiet()), run_directly)
    assert {artifact.id for artifact in chain.analyze(chain.train()).values()} <= made
    assert {one.id for one in chain.workspace.store.list()} == made


@pytest.mark.usefixtures("gelu_1l_in_cache")
def test_gelu_1l_at_its_real_size_equals_the_equations(weights: dict[str, Tensor]):
    model = language_model.load("gelu-1l")
    ids = torch.randint(0, 48262, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = by_hand(weights, ids)
    for name in (POST, "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"):
        torch.testing.assert_close(model.activations(ids, name).double(), expected[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.logits(ids).double(), expected["logits"], rtol=0, atol=1e-4)
    assert torch.equal(model.W_out(0), weights["blocks.0.mlp.W_out"])  # not centred
    assert (model.n_ctx, model.d_vocab, model.tokenizer.id_to_token(model.bos_id)) == (1024, 48262, "<|BOS|>")


def commit_tiny(hub: Hub, folder: Path, seed: int = 0, **settings: Any) -> str:
    return hub.commit(GELU_1L, files_of(TINY | settings, random_weights(TINY | settings, seed), folder))


LOAD = """
import sys, torch
from pipeline import language_model
from storage.errors import ConfigError
for name in sys.argv[1:]:
    try:
        model = language_model.load(name)
    except ConfigError as error:
        print(error)
        continue
    print(model.name, model.commit, model.logits(torch.arange(8)[None]).double().sum().item())
"""


def load_elsewhere(*names: str, home: Path, **environment: str) -> list[list[str]]:
    """Loads models in another process, which reads its environment; name, commit and sum of logits, or the error."""
    merged = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], cwd=ROOT, env=merged, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_online_a_model_comes_from_the_hub_and_offline_from_the_cache(tmp_path: Path):
    hub, home = Hub(tmp_path / "remote"), tmp_path / "home"
    hub.commit(DIGITS, tokenizer_files())
    first = commit_tiny(hub, tmp_path / "first")
    second = commit_tiny(hub, tmp_path / "second", seed=1)
    as_pythia_was_published(tmp_path / "pythia")
    pythia = hub.commit("EleutherAI/pythia-70m", {file.name: file for file in (tmp_path / "pythia").iterdir()})
    names = ["gelu-1l", f"{GELU_1L}@{first}", "pythia-70m"]
    with hub.served() as environment:
        *found, misspelt = load_elsewhere(*names, "NeelNanda/GELU_1L512W", home=home, **environment)
    newest, pinned, other = found
    assert newest[:2] == ["gelu-1l", second]
    assert pinned[:2] == [GELU_1L, first]
    assert newest[2] != pinned[2]
    assert other[:2] == ["pythia-70m", pythia]
    assert " ".join(misspelt).startswith("no such repository")
    assert f"{GELU_1L}," in misspelt  # is the nearest
    assert load_elsewhere(*names, home=home) == found


def test_a_repository_that_moved_is_another_artifact_and_the_old_one_keeps_its_model(
    tmp_path: Path, use_cache: Callable[[Path], None]
):
    hub, home = Hub(tmp_path / "remote"), tmp_path / "home"
    hub.commit(DIGITS, tokenizer_files())
    use_cache(home)
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=1), Quiet())
    made: list[Artifact] = []
    for seed in (0, 1):
        commit_tiny(hub, tmp_path / str(seed), seed=seed)
        for repository in (GELU_1L, DIGITS):
            hub.fill_cache(home / "hub", repository)
        prompts = tokenized("gelu-1l", tmp_path, workspace)
        made.append(harvest.harvest(harvest_config("gelu-1l", POST), prompts, workspace).artifact)
    assert made[0].id != made[1].id
    assert made[0].spec.parents == made[1].spec.parents  # the tokenizer is the same one
    for artifact in made:
        assert language_model.load_recorded(artifact).identity == artifact.config["model"]
    shutil.rmtree(
        home
        / "hub"
        / f"models--{GELU_1L.replace('/', '--')}"
        / "snapshots"
        / str(facts(made[0])["language_model_commit"])
    )
    with pytest.raises(ConfigError, match=r"config\.json"):
        language_model.load_recorded(made[0])


def test_what_the_cache_lacks_is_named(tmp_path: Path, use_cache: Callable[[Path], None]):
    hub, home = Hub(tmp_path / "remote"), tmp_path / "home"
    commit = commit_tiny(hub, tmp_path / "files")
    hub.fill_cache(home / "hub", GELU_1L)
    use_cache(home)
    with pytest.raises(ConfigError, match=rf"tokenizer\.json .*{DIGITS}.*HF_HUB_OFFLINE"):
        language_model.load("gelu-1l")
    hub.commit(DIGITS, tokenizer_files())
    hub.fill_cache(home / "hub", DIGITS)
    snapshot = home / "hub" / f"models--{GELU_1L.replace('/', '--')}" / "snapshots" / commit
    (snapshot / "model_final.pth").rename(snapshot / "some_final.pth")
    named_otherwise = language_model.load("gelu-1l").identity
    (snapshot / "some_final.pth").unlink()
    with pytest.raises(ConfigError, match=rf"no weights .*{GELU_1L} at {commit}.*model_final\.pth"):
        language_model.load("gelu-1l")
    assert len(named_otherwise["weights_sha256"]) == 64
    with pytest.raises(ConfigError, match=rf"config\.json .*{GELU_1L} at v2"):
        language_model.load("gelu-1l@v2")


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("architectures") / request.param
    ARCHITECTURES[request.param](folder)
    return folder


def preset_of(model: str, folder: Path, *overrides: str) -> Preset:
    """The demo's, for a tiny model: 72 training prompts of 12 tokens, two windows of 32."""
    lines = [json.dumps({"text": f"text {n}: " + "lorem ipsum dolor"[n % 7 :]}) + "\n" for n in range(1500)]
    (folder / "texts.jsonl").write_text("".join(lines))
    source = {"name": "lines", "kind": "files", "files": [str(folder / "texts.jsonl")]}
    settings = {
        "tokenize": {"language_model": model, "prompt_tokens": 12, "train_tokens": 864, "held_out_tokens": 24},
        "harvest": {"language_model": model, "window_prompts": 32, "chunk_rows": 8, "encoding": "float32"},
        "train": {"pool_rows": 160},
    }
    said = [f"{stage}.{name}={value}" for stage, values in settings.items() for name, value in values.items()]
    return load_preset("demo", [*said, f"tokenize.sources={json.dumps([source])}", *overrides])


def tokenized(model: str, folder: Path, workspace: Workspace) -> Artifact:
    return tokens.tokenize(preset_of(model, folder).tokenize, workspace).artifact


def harvest_config(model: str, *hook_names: str, dtype: ForwardDtype = "float32", **settings: Any) -> HarvestConfig:
    return HarvestConfig(
        language_model=model, hook_name=hook_names[0], also_hook_names=hook_names[1:], forward_dtype=dtype,
        window_prompts=32, chunk_rows=8, encoding="float32", **settings,
    )  # fmt: skip


def rows_of(artifact: Artifact) -> tuple[np.ndarray[Any, Any], ...]:
    reader = ShardReader(artifact.folder, artifact.id)
    found = reader.read(0, reader.layout.n_rows)
    return found.rows, found.prompt, found.position


def cached(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    _, cache = model.bridge.run_with_cache(ids)
    return dict(cache)


def test_harvested_rows_equal_the_cache_of_a_run_at_every_site(architecture: Path, tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=2), Quiet())
    prompts = tokenized(str(architecture), tmp_path, workspace)
    model = language_model.load(str(architecture))
    cache = cached(model, tokens.TokenTable(prompts).ids("train"))
    wanted = ("mlp.hook_post", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    deep = int(model.bridge.cfg.n_layers)
    layers = range(deep) if deep <= 4 else (0, deep // 2, deep - 1)
    sites = [f"blocks.{layer}.{site}" for layer in layers for site in wanted]
    if architecture.name == "pythia":  # attention and MLP read the same residual stream: there is nothing between them
        sites = [site for site in sites if not site.endswith("hook_resid_mid")]
    for site in sites:
        artifact = harvest.harvest(harvest_config(str(architecture), site, *sites), prompts, workspace).artifact
        rows, prompt, position = rows_of(artifact)
        assert len(rows) == 64 * 11
        expected = cache[site][prompt.astype(np.int64), position.astype(np.int64)]
        atol = 3e-6 * float(expected.abs().max()) * (1 + int(site.split(".")[1]))  # rounding adds up layer by layer
        torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=0, atol=atol)


def test_every_short_name_has_its_architecture_here():
    assert {*HUB_NAMES} <= {*ARCHITECTURES}


def test_prompts_of_another_tokenizer_than_the_models_are_refused(tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=1), Quiet())
    for name in ("first", "second"):
        ARCHITECTURES["gelu-1l"](tmp_path / name)
    (tmp_path / "second" / "tokenizer.json").write_bytes(tokenizer_json(("<|EOS|>", "<|BOS|>")))  # as large
    prompts = tokenized(str(tmp_path / "first"), tmp_path, workspace)
    found, expected = (sha256_file(tmp_path / name / "tokenizer.json")[:12] for name in ("first", "second"))
    with pytest.raises(InputError, match=f"another tokenizer than the model's.*found .*{found}; expected {expected}"):
        harvest.harvest(harvest_config(str(tmp_path / "second"), POST), prompts, workspace)
    assert workspace.store.list("harvest") == []
    assert harvest.harvest(harvest_config(str(tmp_path / "first"), POST), prompts, workspace).status == "made"


def test_a_plan_knows_the_sizes_of_every_architecture(architecture: Path, tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=1), Quiet())
    planned, refusal = plan(preset_of(str(architecture), tmp_path), workspace, full_tokens=10_000, calibrated=False)
    assert refusal is None
    model = language_model.load(str(architecture))
    assert [sizes.site.d_in for sizes in planned.sizes] == [model.W_out(0).shape[0], model.W_out(0).shape[1]]


def test_a_harvest_in_bfloat16_is_an_artifact_of_its_own_and_recorded(architecture: Path, tmp_path: Path):
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=2), Quiet())
    prompts = tokenized(str(architecture), tmp_path, workspace)
    exact, rough = (
        harvest.harvest(harvest_config(str(architecture), POST, dtype=dtype), prompts, workspace).artifact
        for dtype in ("float32", "bfloat16")
    )
    assert (exact.config["forward_dtype"], rough.config["forward_dtype"]) == ("float32", "bfloat16")
    rows, prompt, position = rows_of(rough)
    expected, *places = rows_of(exact)
    assert all(map(np.array_equal, places, (prompt, position)))  # the same prompts at the same rows
    assert np.array_equal(rows, torch.from_numpy(rows).bfloat16().float().numpy())
    assert 0 < np.abs(rows - expected).max() < 0.1 * np.abs(expected).max()
    model = language_model.load_recorded(rough)  # as it was harvested
    again = model.activations(tokens.TokenTable(prompts).ids("train", prompt[:1].astype(np.int64)), POST)[
        0, position[0]
    ]
    np.testing.assert_allclose(again.numpy(), rows[0], rtol=0, atol=0.05 * float(np.abs(expected).max()))
    assert next(model.bridge.parameters()).dtype is torch.bfloat16
