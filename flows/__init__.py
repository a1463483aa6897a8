"""Prefect flows: one a deployment, each a thin layer over ``pipeline.stages``."""
