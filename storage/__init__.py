"""Artifacts and shards on disk: what makes them, names them, checks them and reads them back. Needs no torch."""
