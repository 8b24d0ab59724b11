"""mmpretrain's logger, and weights, for the tests of the backbones."""

import logging

import pytest
import timm
import torch
from helpers.backbone_cases import ALL_CASES, CASES, make_timm, weights
from helpers.kinds import quick
from helpers.randomised import randomise

# One of each branch of the code by default: the others put the same parts together.
USUAL = ['SKNet', 'SKNet-29-se', 'SKResNet-18', 'SKResNetSimCLR', 'SKShuffleNetV2', 'SKShuffleNetV2-plain']


@pytest.fixture(params=quick(CASES, USUAL))
def case(request):
    return CASES[request.param]


@pytest.fixture(params=quick(ALL_CASES, USUAL))
def any_case(request):
    return ALL_CASES[request.param]


@pytest.fixture(autouse=True)
def logger():
    """mmengine's current logger, without the lines that it prints for every parameter that is initialised."""
    loggers = pytest.importorskip('mmengine.logging').MMLogger
    logger = loggers.get_instance('sknet-tests')
    logger.handlers.clear()
    yield logger
    loggers._instance_dict.pop('sknet-tests')


@pytest.fixture
def warned(logger, caplog, capsys):
    """What mmengine has logged as a warning or, where it is given no logger, printed."""
    logger.addHandler(caplog.handler)

    def warned():
        logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        printed = capsys.readouterr().out.splitlines()
        return logged + [line for line in printed if line.strip() and not line.startswith('Loads checkpoint by ')]

    return warned


@pytest.fixture(scope='session')
def tiny():
    return make_timm()


@pytest.fixture(scope='session')
def sknet50():
    torch.manual_seed(0)
    return randomise(timm.create_model('sknet50'))


@pytest.fixture(scope='session')
def published(sknet50):
    return weights(sknet50)
