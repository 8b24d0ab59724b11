"""Backbones in training: frozen stages, norms, checkpointing, synchronised statistics."""

import copy

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import torch
import torch.distributed as dist
from helpers.backbone_cases import (
    CASES,
    SHUFFLE_PARTS,
    make_input,
)
from helpers.backbones import (
    assert_equal,
    get_classifier,
    make_backbone,
    make_classifier,
)
from helpers.tolerances import assert_close
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def train_step(model, case):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    loss = sum(output.square().mean() for output in model(make_input(size=case.size)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def frozen_names(model, case, frozen_stages):
    prefixes = tuple(prefix for part in case.parts[: frozen_stages + 1] for prefix in part)
    return {name for name in model.state_dict() if name.startswith(prefixes)} if prefixes else set()


# Tensors in the state dict of the stem and the first so many stages, counted by hand: a norm has five, so that an SK
# bottleneck has 31, an SK basic unit 25, a shortcut 6, and ShuffleNetV2's two kinds of unit 30 and 31.
FROZEN = {
    'SKNet': (6, 68, 136, 204, 272),
    'SKNet-29': (6, 37, 74, 111),
    'SKResNeXt': (6, 37, 74, 111, 148),
    'SKResNet-18': (6, 62, 118, 174, 230),
    'SKShuffleNetV2': (6, 67, 128, 189, 195),
}


class TestTraining:
    @pytest.mark.parametrize(
        ('name', 'frozen_stages', 'tensors'),
        [(name, i, tensors) for name, counts in FROZEN.items() for i, tensors in enumerate((0, *counts), start=-1)],
    )
    def test_frozen_stages(self, name, frozen_stages, tensors):
        case = CASES[name]
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=frozen_stages)
        frozen = frozen_names(model, case, frozen_stages)
        assert len(frozen) == tensors
        before = copy.deepcopy(model.state_dict())
        for mode in (True, False, True):
            model.train(mode)
            assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
                name for name, _ in model.named_parameters() if name in frozen
            }
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm):
                    assert module.training == (mode and f'{name}.weight' not in frozen), name
        if frozen_stages == len(case.channels):
            assert not model(make_input(size=case.size))[-1].requires_grad
            unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
            assert unchanged == set(before)
        else:
            train_step(model, case)
            unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
            assert unchanged == frozen

    def test_stages_after_the_last_output(self, case, tmp_path):
        """They would get no gradient, for which DistributedDataParallel would wait in its second step."""
        model = make_backbone(0, case, out_indices=(0,)).train()
        unused = tuple(prefix for part in case.parts[2:] for prefix in part)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
            name for name, _ in model.named_parameters() if name.startswith(unused)
        }
        before = copy.deepcopy(model.state_dict())
        dist.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                train_step(parallel, case)
        finally:
            dist.destroy_process_group()
        unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
        assert unchanged == {name for name in before if name.startswith(unused)}

    def test_frozen_in_a_classifier(self):
        classifier = get_classifier(frozen_stages=2)
        classifier.train()
        assert classifier.training
        assert not classifier.backbone.layer2[0].conv1.bn.training
        assert classifier.backbone.layer3[0].conv1.bn.training

    @pytest.mark.parametrize('frozen_stages', [-1, 1])
    def test_norm_eval(self, case, frozen_stages):
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=frozen_stages, norm_eval=True)
        before = copy.deepcopy(model.state_dict())
        buffers = {name for name, _ in model.named_buffers()}
        model.train()
        assert model.training
        assert model.get_submodule(case.parts[3][0] + '0').training
        assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
        train_step(model, case)
        unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
        assert unchanged == buffers | frozen_names(model, case, frozen_stages)

    def test_norm_eval_leaves_drop_path_on(self):
        model = make_backbone(norm_eval=True, drop_path_rate=0.1).train()
        assert model.layer4[1].drop_path.training
        assert not model.layer4[1].conv1.bn.training

    def test_norm_eval_of_sync_bn(self):
        model = make_backbone(norm_eval=True, norm_cfg=dict(type='SyncBN')).train()
        assert not any(m.training for m in model.modules() if isinstance(m, nn.SyncBatchNorm))

    @pytest.mark.parametrize('frozen_stages', [-1, 1])
    def test_with_cp(self, case, frozen_stages):
        """The same outputs and gradients, from units that run twice; also behind a stage that has none."""
        drop_path = {} if case.parts is SHUFFLE_PARTS else dict(drop_path_rate=0.2)
        results, gradients, runs = [], [], []
        for with_cp in (False, True):
            model = make_backbone(
                0, case, out_indices=case.every, frozen_stages=frozen_stages, with_cp=with_cp, **drop_path
            ).train()
            ran = []
            for part in case.parts[1:4]:
                model.get_submodule(part[0] + '0').register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            torch.manual_seed(2)
            outputs = model(make_input(size=case.size))
            sum(output.square().mean() for output in outputs).backward()
            results.append([output.detach() for output in outputs])
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
            runs.append(len(ran))
        assert runs == [3, 6 if frozen_stages == -1 else 5]
        assert_equal(*results)
        assert gradients[0].keys() == gradients[1].keys()
        assert all(gradient is not None for gradient in gradients[1].values())
        # What runs twice adds its gradients up in another order.
        largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
        assert_close(gradients[1], gradients[0], length=model, scale=largest)

    def test_with_cp_in_eval(self, case):
        x = make_input(size=case.size)
        with torch.no_grad():
            assert_equal(make_backbone(0, case, with_cp=True)(x), make_backbone(0, case)(x))

    @pytest.mark.parametrize(
        ('name', 'lr', 'channels_last'),
        [
            ('SKNet', 0.01, False),
            ('SKNet', 0.01, True),
            ('SKResNet-18', 0.01, False),
            ('SKShuffleNetV2', 0.1, False),
        ],
    )
    def test_loss_of_a_classifier_falls(self, name, lr, channels_last):
        torch.manual_seed(0)
        classifier = make_classifier(CASES[name], channels_last=channels_last)
        classifier.init_weights()
        optimizer = torch.optim.SGD(classifier.train().parameters(), lr=lr)
        samples = [mmpretrain.structures.DataSample().set_gt_label(i) for i in range(4)]
        losses = []
        for _ in range(8):
            loss = classifier(make_input(4), samples, mode='loss')['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(np.log(10), rel=0.1)
        assert losses[-1] < 0.7 * losses[0]

    def test_sync_batchnorm(self, case):
        """In training as in eval, there and back; timm's own units lose their ReLUs here."""

        def outputs(model, mode):
            with torch.no_grad():
                return copy.deepcopy(model).train(mode)(make_input(size=case.size).double())

        def count(model, kind):
            return sum(type(m) is kind for m in model.modules())

        # In float64, since batch statistics of small maps amplify rounding.
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=1).double()
        first = case.parts[1][0][:-1]
        keys = list(model.state_dict())
        expected = {mode: outputs(model, mode) for mode in (False, True)}
        norms = count(model, nn.BatchNorm2d)
        assert norms == sum(name.endswith('running_mean') for name in keys) > 15

        for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm):
            converted = convert(copy.deepcopy(model))
            assert count(converted, nn.SyncBatchNorm) == norms
            assert count(converted, nn.BatchNorm2d) == 0
            assert count(converted, nn.ReLU) == count(model, nn.ReLU)
            assert list(converted.state_dict()) == keys
            assert not any(m.training for m in converted.train().get_submodule(first).modules())
            assert not any(p.requires_grad for p in converted.get_submodule(first).parameters())

            reverted = revert_sync_batchnorm(copy.deepcopy(converted))
            assert count(reverted, nn.SyncBatchNorm) == 0
            assert list(reverted.state_dict()) == keys
            for mode, gain in ((False, 1), (True, 1e4)):
                assert_equal(outputs(converted, mode), expected[mode], length=model, gain=gain)
                assert_equal(outputs(reverted, mode), expected[mode], length=model, gain=gain)


def test_frozen_stem_has_its_pooling_convolution():
    backbone = make_backbone(replace_stem_pool=True, frozen_stages=0).train()
    assert not any(module.training for module in backbone.maxpool.modules())
    assert not any(parameter.requires_grad for parameter in backbone.maxpool.parameters())
    assert backbone.layer1[0].conv1.conv.weight.requires_grad
