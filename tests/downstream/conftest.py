import pytest
import timm
from helpers.randomised import randomise
from safetensors.torch import save


@pytest.fixture(scope='session')
def skresnext50():
    """timm's own network, with weights and statistics of its own."""
    return randomise(timm.create_model('skresnext50_32x4d'))


@pytest.fixture
def published(hub, skresnext50):
    """The loopback Hub with SKNet-50's repository."""
    hub.add('timm/skresnext50_32x4d.ra_in1k', {'model.safetensors': save(skresnext50.state_dict())})
    return hub
