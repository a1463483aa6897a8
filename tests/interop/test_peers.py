"""Checkpoints through the peers' own code, each in an environment of its own: ``make test-interop``.

Both need transformer-lens below 4, so they cannot share ours. The peer loads what we export and is asked for feature
activations and reconstructions; then it saves what it loaded, and we read that.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers.environments import python_of
from pipeline.checkpoints import Provenance, read_checkpoint, write_checkpoint
from sae.autoencoder import Autoencoder

pytestmark = pytest.mark.interop
HOME = Path(os.environ.get("SPARSEMILL_INTEROP_HOME", Path(__file__).parents[2] / ".interop"))
SAELENS = """
import os, sys, numpy as np, torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
folder, rows, out = sys.argv[1:]
sae = SAE.load_from_disk(folder)
acts = sae.encode(torch.from_numpy(np.load(rows)))
loaders.hf_hub_download = lambda repo_id, filename, **_: os.path.join(folder, os.path.basename(filename))
_, _, log_sparsity = loaders.sae_lens_huggingface_loader("owner/name", "sae")
np.savez(out, acts=acts.detach().numpy(), sae_out=sae.decode(acts).detach().numpy(), log_sparsity=log_sparsity)
sae.save_model(folder + "-saved")
"""
DICTIONARY_LEARNING = """
import json, os, sys, numpy as np, torch
from dictionary_learning.utils import load_dictionary
folder, rows, out = sys.argv[1:]
dictionary, config = load_dictionary(folder, "cpu")
sae_out, acts = dictionary(torch.from_numpy(np.load(rows)), output_features=True)
np.savez(out, acts=acts.detach().numpy(), sae_out=sae_out.detach().numpy())
os.mkdir(folder + "-saved")
torch.save(dictionary.state_dict(), folder + "-saved/ae.pt")
json.dump(config, open(folder + "-saved/config.json", "w"))
"""
SCRIPTS = {"saelens": SAELENS, "dictionary_learning": DICTIONARY_LEARNING}


def ask(peer: str, folder: Path, rows: Path) -> dict[str, np.ndarray]:
    out = folder.with_name(f"{folder.name}-out.npz")
    command = [str(python_of(peer, HOME)), "-c", SCRIPTS[peer], str(folder), str(rows), str(out)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=offline)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize("peer", list(SCRIPTS))
def test_a_peer_computes_what_we_compute_and_its_own_save_reads_back(peer: str, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(64, 300, generator=generator), torch.randn(300, 64, generator=generator)
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)  # dictionary_learning rescales others when it loads
    sae = Autoencoder(W_enc / 8, torch.randn(300, generator=generator) / 4, W_dec, torch.randn(64, generator=generator))
    rows = torch.randn(50, 64, generator=generator)
    np.save(tmp_path / "rows.npy", rows.numpy())
    folder = tmp_path / "export"
    folder.mkdir()
    densities = torch.rand(300, generator=generator, dtype=torch.float64)
    said = Provenance(
        "train-0123456789ab", "blocks.0.mlp.hook_post", "gelu-1l", 128, include_bos=False, densities=densities
    )
    for name, data in write_checkpoint(peer, sae, said).items():
        (folder / name).write_bytes(data)
    theirs = ask(peer, folder, tmp_path / "rows.npy")
    acts = sae.encode(rows).numpy()
    assert (acts > 0).mean() > 0.2
    np.testing.assert_allclose(theirs["acts"], acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theirs["sae_out"], sae(rows).sae_out.numpy(), rtol=1e-5, atol=1e-5)
    if peer == "saelens":
        np.testing.assert_allclose(10 ** theirs["log_sparsity"].astype(float), densities.numpy(), rtol=1e-5)
    back = read_checkpoint(f"{folder}-saved")
    assert (back.format, back.hook_name, back.language_model) == (peer, said.hook_name, said.language_model)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(back.sae, name), getattr(sae, name), rtol=1e-6, atol=1e-6)
