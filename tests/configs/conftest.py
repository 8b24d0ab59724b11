import pytest


@pytest.fixture(scope='session', autouse=True)
def format_once():
    """The Runner has yapf format one config three times, a third of the time that these tests would take."""
    yapf_api = pytest.importorskip('yapf.yapflib.yapf_api')
    format_code, done = yapf_api.FormatCode, {}

    def cached(text, **settings):
        key = (text, repr(settings))
        if key not in done:
            done[key] = format_code(text, **settings)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', cached)
        yield
