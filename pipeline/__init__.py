"""The stages: documents, prompts, shards of activations, an autoencoder, findings, a report."""
