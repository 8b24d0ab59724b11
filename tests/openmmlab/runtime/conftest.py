import pytest
import torch


@pytest.fixture(scope='module')
def no_wait_for_workers():
    """A loader whose worker has raised waits five seconds for each of them when it is collected, in some later test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.1)
        yield
