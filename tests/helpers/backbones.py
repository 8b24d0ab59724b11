"""Backbones and classifiers of mmpretrain's registry, and files of weights for them."""

import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import torch
from mmpretrain.registry import MODELS
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.backbone_cases import (
    CASES,
    NARROW,
    make_input,
)
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from sk_plugins.mmpretrain_models import SKNet
from sk_plugins.weights import save_mmengine_checkpoint, to_mmpretrain


def make_backbone(seed=0, case=CASES['SKNet'], **kwargs):
    torch.manual_seed(seed)
    return randomise(MODELS.build({**case.cfg, **kwargs}), seed)


def make_classifier(case, num_classes=10, **backbone):
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone={**case.cfg, **backbone},
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=case.channels[-1], topk=(1,)),
        )
    ).eval()


def get_classifier(pretrained=False, **backbone):
    """The narrow network where a named model's config says SKNet-50, through mmpretrain's API."""
    return mmpretrain.get_model(
        'sknet50_in1k',
        pretrained=pretrained,
        backbone=dict(depth=26, **{**NARROW, **backbone}),
        head=dict(in_channels=512, num_classes=10, topk=(1, 5)),
    )


def same_state(backbone, timm_model):
    """Bit for bit, whatever ``timm_model`` has beside a backbone."""
    wanted = {k: v for k, v in timm_model.state_dict().items() if not k.startswith('fc.')}
    state_dict = backbone.state_dict()
    return list(state_dict) == list(wanted) and all(torch.equal(state_dict[k], wanted[k]) for k in wanted)


def assert_equal(outputs, expected, length=None, **model):
    """Bit for bit, or but for rounding in sums of ``length``."""
    if length is not None:
        assert_close(list(outputs), list(expected), length=length, **model)
        return
    assert len(outputs) == len(expected)
    assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected))


def count(model):
    return sum(p.numel() for p in model.parameters())


def save_as(kind, model, path):
    """One of the files that people have, and the ``init_cfg`` that reads it."""
    if kind == 'timm.pth':
        torch.save(model.state_dict(), path / 'tiny.pth')
    elif kind == 'timm-training.pth':
        torch.save(dict(epoch=3, arch='sknet26', state_dict=model.state_dict()), path / 'tiny.pth')
    elif kind == 'ddp.pth':
        torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, path / 'tiny.pth')
    elif kind == 'timm.safetensors':
        save_file(model.state_dict(), path / 'tiny.safetensors')
    elif kind == 'mmengine.pth':
        save_mmengine_checkpoint(model.state_dict(), path / 'tiny.pth')
    elif kind == 'mmengine.safetensors':
        save_file(to_mmpretrain(model.state_dict()), path / 'tiny.safetensors')
    file = next(path.glob('tiny.*'))
    return dict(type='Pretrained', checkpoint=str(file))


TIMM_FILES = ['timm.pth', 'timm-training.pth', 'ddp.pth', 'timm.safetensors']

FILES = [*TIMM_FILES, 'mmengine.pth', 'mmengine.safetensors']


def initialise(init_cfg, **kwargs):
    model = SKNet(26, init_cfg=init_cfg, **{**NARROW, **kwargs})
    model.init_weights()
    return model


def settle(model, size=64):
    """Statistics of BatchNorm that fit the weights, or the logits of a deep random network hardly heed its input."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(make_input(8, size=size))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def assert_same_logits(classifier, model, size=64, dtype=torch.float32):
    """A classifier of mmpretrain's and a model of timm's or torchvision's."""
    x = make_input(size=size).to(dtype)
    with torch.no_grad():
        expected = model.to(dtype)(x)
        assert_close(classifier.to(dtype).eval()(x), expected, length=model)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the images do tell in the logits
