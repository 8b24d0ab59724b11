import pytest
from helpers.plain_engine import put_in_place


@pytest.fixture
def engine_of(monkeypatch):
    """Makes an engine the one that 'auto' finds."""

    def take(engine):
        if engine == 'triton':
            put_in_place(monkeypatch)

    return take
