import os
import shutil

import pytest
from hub_server import HubServer

# Before any test imports a Hub client, which reads these once: nothing here may reach the network, so that outside
# the `hub` fixture the Hub is a port that nothing listens on.
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
os.environ.setdefault('HF_HUB_DISABLE_XET', '1')
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
os.environ['HF_HUB_DISABLE_IMPLICIT_TOKEN'] = '1'
os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running HubServer, with the client (and that of subprocesses) pointed at it and at the cache ``hub.cache``."""
    from huggingface_hub import constants, file_download

    server = HubServer().start()
    home = tmp_path / 'hf'
    server.cache = home / 'hub'
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setenv('HF_HOME', str(home))
    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(server.cache))
    template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    for module in (constants, file_download):  # clients before 1.0 read the latter's
        monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
    # Or the client tries a HEAD request six times over 23 s where the Hub is down.
    for name in ('_DEFAULT_RETRY_ON_EXCEPTIONS', '_DEFAULT_RETRY_ON_STATUS_CODES'):
        monkeypatch.setattr(file_download, name, (), raising=False)
    yield server
    server.stop()
    shutil.rmtree(home, ignore_errors=True)  # pytest keeps tmp_path of three runs
