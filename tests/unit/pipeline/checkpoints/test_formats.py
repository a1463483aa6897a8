"""Checkpoints as other programs write them, made here by hand from their published layouts."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import FORMATS, Provenance, read_checkpoint, write_checkpoint
from sae.autoencoder import Autoencoder
from storage.errors import InputError

D, S = 6, 10
SAID = Provenance("train-0123456789ab", "blocks.1.hook_mlp_out", "gelu-2l", 128, False, {"l1_coeff": 0.5})


@pytest.fixture
def sae() -> Autoencoder:
    generator = torch.Generator().manual_seed(0)
    return Autoencoder(*(torch.randn(*shape, generator=generator) for shape in ((D, S), (S,), (S, D), (D,))))


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(1))


def state(sae: Autoencoder) -> dict[str, torch.Tensor]:
    return {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}


def saelens_folder(folder: Path, sae: Autoencoder, **changes: Any) -> Path:
    """As SAELens 6 saves one."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state(sae).items()}, folder / "sae_weights.safetensors")
    metadata = {
        "sae_lens_version": "6.0.0", "model_name": "gelu-1l", "hook_name": "blocks.0.mlp.hook_post",
        "hook_head_index": None, "context_size": 128, "prepend_bos": True, "dataset_path": "c4",
    }  # fmt: skip
    config = {
        "architecture": "standard", "d_in": D, "d_sae": S, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": metadata,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


def dictionary_folder(folder: Path, sae: Autoencoder, **trainer: Any) -> Path:
    """As dictionary_learning saves one."""
    folder.mkdir(parents=True)
    tensors = {
        "bias": sae.b_dec,
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
    }
    torch.save(tensors, folder / "ae.pt")
    said = {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": S, "layer": 1, "lm_name": "pythia-70m"}
    (folder / "config.json").write_text(json.dumps({"trainer": said | trainer, "buffer": {"ctx_len": 128}}))
    return folder


def test_the_posts_own_layout_is_read_with_its_config(tmp_path: Path, sae: Autoencoder, rows: torch.Tensor) -> None:
    torch.save(state(sae), tmp_path / "25.pt")
    config = {"model_name": "gelu-1l", "site": "post", "layer": 0, "num_tokens": 2e9, "l1_coeff": 3e-4}
    (tmp_path / "25_cfg.json").write_text(json.dumps(config))
    for place in (tmp_path / "25.pt", tmp_path):
        found = read_checkpoint(str(place))
        assert (found.format, found.hook_name, found.language_model) == ("author", "blocks.0.mlp.hook_post", "gelu-1l")
        assert found.train_tokens == 2_000_000_000
        assert torch.equal(found.sae.encode(rows), sae.encode(rows))
        assert torch.equal(found.sae(rows).sae_out, sae(rows).sae_out)


def test_every_key_of_the_posts_config_is_optional_and_norms_stay(tmp_path: Path, sae: Autoencoder) -> None:
    torch.save({name: tensor.half() for name, tensor in state(sae).items()}, tmp_path / "x.pt")
    found = read_checkpoint(str(tmp_path / "x.pt"))
    assert (found.hook_name, found.language_model, found.train_tokens) == (None, None, None)
    assert found.sae.W_dec.dtype == torch.float32
    torch.testing.assert_close(found.sae.W_dec.norm(dim=1), sae.W_dec.norm(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("config", "hook"),
    [
        ({"site": "mlp_out", "layer": 1}, "blocks.1.hook_mlp_out"),
        ({"act_name": "blocks.0.hook_resid_mid"}, "blocks.0.hook_resid_mid"),
        ({"site": "somewhere"}, None),
    ],
)
def test_the_posts_site_names_are_understood(
    tmp_path: Path, sae: Autoencoder, config: dict[str, Any], hook: str | None
) -> None:
    torch.save(state(sae), tmp_path / "1.pt")
    (tmp_path / "1_cfg.json").write_text(json.dumps(config))
    assert read_checkpoint(str(tmp_path / "1.pt")).hook_name == hook


def test_several_checkpoints_in_a_folder_are_asked_about(tmp_path: Path, sae: Autoencoder) -> None:
    for name in ("25.pt", "47.pt"):
        torch.save(state(sae), tmp_path / name)
    with pytest.raises(InputError, match=r"25\.pt, 47\.pt"):
        read_checkpoint(str(tmp_path))


def test_saelens_folders_are_read(tmp_path: Path, sae: Autoencoder, rows: torch.Tensor) -> None:
    folder = saelens_folder(tmp_path / "sae", sae)
    for place in (folder, folder / "cfg.json"):
        found = read_checkpoint(str(place))
        assert (found.format, found.hook_name, found.language_model) == ("saelens", "blocks.0.mlp.hook_post", "gelu-1l")
        assert torch.equal(found.sae(rows).sae_out, sae(rows).sae_out)
    uncentred = read_checkpoint(str(saelens_folder(tmp_path / "other", sae, apply_b_dec_to_input=False))).sae
    assert torch.equal(uncentred.encode(rows), torch.relu(rows @ sae.W_enc + sae.b_enc))


def test_older_saelens_configs_name_their_site_at_the_top(tmp_path: Path, sae: Autoencoder) -> None:
    folder = saelens_folder(tmp_path / "sae", sae)
    config = json.loads((folder / "cfg.json").read_text())
    config |= {"hook_name": "blocks.0.hook_mlp_out", "model_name": "gelu-2l"}
    del config["metadata"]
    (folder / "cfg.json").write_text(json.dumps(config))
    found = read_checkpoint(str(folder))
    assert (found.hook_name, found.language_model) == ("blocks.0.hook_mlp_out", "gelu-2l")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "not a ReLU autoencoder"),
        ({"activation_fn": "topk"}, "not a ReLU autoencoder"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations"),
    ],
)
def test_saelens_architectures_that_are_not_ours_are_refused(
    tmp_path: Path, sae: Autoencoder, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_checkpoint(str(saelens_folder(tmp_path / "sae", sae, **change)))


def test_dictionary_learning_folders_are_read(tmp_path: Path, sae: Autoencoder, rows: torch.Tensor) -> None:
    dictionary_folder(tmp_path / "run" / "trainer_0", sae, submodule_name="resid_post_layer_1")
    for place in (tmp_path / "run", tmp_path / "run" / "trainer_0", tmp_path / "run" / "trainer_0" / "ae.pt"):
        found = read_checkpoint(str(place))
        assert found.format == "dictionary_learning"
        assert (found.hook_name, found.language_model) == ("blocks.1.hook_resid_post", "pythia-70m")
        torch.testing.assert_close(found.sae(rows).sae_out, sae(rows).sae_out)
    with pytest.raises(InputError, match="GatedAutoEncoder"):
        read_checkpoint(str(dictionary_folder(tmp_path / "gated", sae, dict_class="GatedAutoEncoder")))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_reads_back_to_the_same_bits(
    tmp_path: Path, sae: Autoencoder, name: str, rows: torch.Tensor
) -> None:
    for file, data in write_checkpoint(name, sae, SAID).items():
        (tmp_path / file).write_bytes(data)
    found = read_checkpoint(str(tmp_path))
    assert (found.format, found.hook_name, found.language_model) == (name, SAID.hook_name, SAID.language_model)
    assert torch.equal(found.sae.encode(rows), sae.encode(rows))
    assert torch.equal(found.sae(rows).sae_out, sae(rows).sae_out)


def test_a_saelens_export_has_the_keys_that_its_loader_needs_and_densities(tmp_path: Path, sae: Autoencoder) -> None:
    densities = torch.linspace(0, 0.1, S, dtype=torch.float64)
    files = write_checkpoint("saelens", sae, replace(SAID, densities=densities))
    config = json.loads(files["cfg.json"])
    assert config["architecture"] == "standard"
    assert config["dtype"] == "float32"
    assert config["metadata"]["sparsemill_artifact"] == SAID.artifact_id
    assert config["metadata"]["context_size"] == 128
    (tmp_path / "s").write_bytes(files["sparsity.safetensors"])
    torch.testing.assert_close(load_file(tmp_path / "s")["sparsity"], torch.log10(densities + 1e-10).float())


@pytest.mark.parametrize("include_bos", [True, False, None])
@pytest.mark.parametrize("bos", [True, False, None])
def test_a_saelens_export_says_of_the_prompts_what_is_known(
    tmp_path: Path, sae: Autoencoder, bos: bool | None, include_bos: bool | None
) -> None:
    said = replace(SAID, bos=bos, include_bos=include_bos, train_tokens=2_000_000_000)
    for file, data in write_checkpoint("saelens", sae, said).items():
        (tmp_path / file).write_bytes(data)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["prepend_bos"] == bos
    assert metadata["exclude_special_tokens"] is False  # of which EOS is one
    if include_bos is None:
        assert metadata["seqpos_slice"] is None
    else:
        assert next(iter(range(128)[slice(*metadata["seqpos_slice"])])) == (0 if include_bos else 1)
    assert read_checkpoint(str(tmp_path)).train_tokens == 2_000_000_000


def test_dictionary_learning_has_no_word_for_an_uncentred_input(sae: Autoencoder) -> None:
    uncentred = Autoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, subtract_b_dec=False)
    with pytest.raises(InputError, match="saelens"):
        write_checkpoint("dictionary_learning", uncentred, SAID)
    with pytest.raises(InputError, match="no such format"):
        write_checkpoint("npz", sae, SAID)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", ["25.pt", "ae.pt"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "executed"
    torch.save({"W_enc": _Payload(str(mark))}, tmp_path / name)
    with pytest.raises(InputError, match="tensors alone"):
        read_checkpoint(str(tmp_path))
    (tmp_path / name).write_bytes(pickle.dumps(_Payload(str(mark))))
    with pytest.raises(InputError, match="tensors alone"):
        read_checkpoint(str(tmp_path))
    assert not mark.exists()


def test_what_cannot_be_an_autoencoder_is_refused_by_name(tmp_path: Path, sae: Autoencoder) -> None:
    cases: list[tuple[Any, str]] = [
        ({"W_enc": sae.W_enc}, "lacks tensors"),
        (state(sae) | {"b_enc": torch.zeros(S + 1)}, "shapes"),
        (state(sae) | {"W_dec": torch.full((S, D), torch.nan)}, "W_dec holds values that are not finite"),
        (state(sae) | {"b_dec": torch.zeros(D, dtype=torch.int64)}, "floating type"),
        ([sae.W_enc], "no state dict"),
    ]
    for number, (saved, message) in enumerate(cases):
        torch.save(saved, tmp_path / f"{number}.pt")
        with pytest.raises(InputError, match=message):
            read_checkpoint(str(tmp_path / f"{number}.pt"))
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="known format"):
        read_checkpoint(str(tmp_path / "empty"))


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '"x"'])
def test_a_bad_config_is_an_error_that_names_the_file(tmp_path: Path, sae: Autoencoder, text: str) -> None:
    folder = saelens_folder(tmp_path / "sae", sae)
    (folder / "cfg.json").write_text(text)
    with pytest.raises(InputError, match=r"cfg\.json"):
        read_checkpoint(str(folder))
    (folder / "sae_weights.safetensors").write_bytes(b"\xff" * 40)
    (folder / "cfg.json").write_text("{}")
    with pytest.raises(InputError, match="does not read"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("source", ["hf://owner", "hf://owner/name/../../x"])
def test_a_malformed_hub_reference_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="not a place on the Hub"):
        read_checkpoint(source)


def test_a_checkpoint_in_the_hubs_cache_is_found_without_a_network(
    tmp_path: Path, sae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--NeelNanda--sparse_autoencoder"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    torch.save(state(sae), snapshot / "25.pt")
    (snapshot / "25_cfg.json").write_text(json.dumps({"site": "post", "layer": 0}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = read_checkpoint("hf://NeelNanda/sparse_autoencoder/25.pt")
    assert found.hook_name == "blocks.0.mlp.hook_post"
    assert torch.equal(found.sae.W_enc, sae.W_enc)
    with pytest.raises(InputError, match="not to be had"):
        read_checkpoint("hf://NeelNanda/another/25.pt")
