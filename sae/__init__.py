"""The autoencoder and its training: tensors in, named tensors and JSON out; no files, nothing of ours outside."""
