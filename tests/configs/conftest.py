import pytest


@pytest.fixture
def formatted(yapf_format, monkeypatch):
    """Configs are written as a user's are; the Runner has yapf format one three times, and here once."""
    done = {}

    def cached(text, **settings):
        if text not in done:
            done[text] = yapf_format(text, **settings)
        return done[text]

    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', cached)
