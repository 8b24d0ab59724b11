"""mmpretrain's logger, and weights, for the tests of the backbones."""

import logging

import pytest
import timm
import torch
from helpers.backbone_cases import ALL_CASES, CASES, make_timm, weights
from helpers.randomised import randomise

# One of each branch of the code by default: the others put the same parts together.
OTHERS = {'SKResNeXt', 'SKNet-29', 'SKNet-29-plain', 'SKResNet-50d', 'SKShuffleNetV2-se'}


def each(cases):
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in OTHERS else []) for name, case in cases.items()
    ]


@pytest.fixture(params=each(CASES))
def case(request):
    return request.param


@pytest.fixture(params=each(ALL_CASES))
def any_case(request):
    return request.param


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
