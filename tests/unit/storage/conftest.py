"""Fixtures of the storage tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fsync free: only a power cut could tell, and hundreds of them cost seconds. Hooks see its calls."""

    def free(descriptor: int) -> None: ...

    monkeypatch.setattr(os, "fsync", free)
