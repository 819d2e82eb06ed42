"""Retries without long pauses."""

import pytest

from steer import rewards


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rewards.remote.http_request, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rewards.remote.http_request, "LONGEST_WAIT", 0.1)
