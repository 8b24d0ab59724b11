"""Weights through init_cfg and load_checkpoint."""

import re

import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.backbone_cases import ALL_CASES, NARROW, PUBLISHED, REPO, make_input, make_timm, weights
from helpers.backbones import (
    FILES,
    TIMM_FILES,
    assert_same_logits,
    get_classifier,
    initialise,
    make_backbone,
    make_classifier,
    same_state,
    save_as,
    settle,
)
from helpers.tolerances import assert_close
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS

from sk_plugins.weights import CheckpointError, HubError, to_mmpretrain


class TestInitCfg:
    @pytest.mark.parametrize('prefix', [{}, dict(prefix='backbone.')], ids=str)
    @pytest.mark.parametrize('kind', [*FILES, 'hf-hub'])
    def test_with_a_prefix_and_without(self, hub, tmp_path, tiny, kind, prefix, warned):
        """So that another checkpoint can take a config's place, whichever has the classifier's names."""
        hub.add(REPO, weights(tiny))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = {**(hf_hub if kind == 'hf-hub' else save_as(kind, tiny, tmp_path)), **prefix}
        given = dict(init_cfg)
        assert same_state(initialise(init_cfg), tiny)
        assert init_cfg == given
        assert warned() == []

    def test_of_a_detector_in_training(self, tmp_path, tiny, warned):
        """Of a checkpoint's other parts, none is looked at."""
        state_dict = {f'backbone.{k}': v for k, v in tiny.state_dict().items() if not k.startswith('fc.')}
        state_dict |= {'neck.conv1.weight': torch.ones(1), 'bbox_head.fc.weight': torch.ones(1)}
        optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1).state_dict()
        torch.save(dict(meta=dict(epoch=1), state_dict=state_dict, optimizer=optimizer), tmp_path / 'epoch_1.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'epoch_1.pth'))
        assert same_state(initialise(init_cfg), tiny)
        assert warned() == []

    def test_after_another_initialiser(self, tmp_path, tiny):
        """Each checkpoint of a list is named in its own error."""
        constant = dict(type='Constant', layer='Conv2d', val=0.0)
        fitting = save_as('timm.pth', tiny, tmp_path)
        assert same_state(initialise([constant, fitting]), tiny)
        torch.save(make_timm(in_chans=1).state_dict(), tmp_path / 'grey.pth')
        grey = dict(type='Pretrained', checkpoint=str(tmp_path / 'grey.pth'))
        with pytest.raises(
            CheckpointError, match=r'/grey\.pth: its weights do not fit .*conv1.weight is \(64, 1, 7, 7'
        ):
            initialise([fitting, constant, grey])

    @pytest.mark.parametrize('as_list', [False, True])
    def test_hf_hub(self, hub, tiny, as_list, warned):
        hub.add(REPO, weights(tiny))
        init_cfg = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        assert same_state(initialise([init_cfg] if as_list else init_cfg, frozen_stages=1), tiny)
        assert warned() == []

    def test_hf_hub_revision(self, hub, tiny, warned):
        old, branch = make_timm(seed=1), make_timm(seed=2)
        commit = hub.add(REPO, weights(old), 'v1')
        hub.add(REPO, weights(branch), 'refs/pr/1')
        hub.add(REPO, weights(tiny))
        for revision, model in (('', tiny), ('@v1', old), (f'@{commit}', old), ('@refs/pr/1', branch)):
            assert same_state(initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}{revision}')), model)
        assert warned() == []

    def test_hf_hub_without_a_classifier(self, hub, warned):
        headless = make_timm(num_classes=0)
        hub.add(REPO, weights(headless))
        assert same_state(initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')), headless)
        assert warned() == []

    def test_published(self, hub, sknet50, published, warned):
        """The line of the README, in a detector."""
        hub.add(PUBLISHED, published)
        cfg = dict(
            type='mmpretrain.SKNet',
            depth=50,
            out_indices=(0, 1, 2, 3),
            init_cfg=dict(type='Pretrained', checkpoint=f'hf-hub:{PUBLISHED}'),
        )
        model = ROOT_MODELS.build(cfg)
        model.init_weights()
        assert same_state(model, sknet50)
        assert warned() == []

    @pytest.mark.parametrize('checkpoint', ['timm.pth', 'hf-hub'])
    def test_of_a_classifiers_backbone(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = hf_hub if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)
        classifier = get_classifier(init_cfg=init_cfg)
        classifier.init_weights()
        assert same_state(classifier.backbone, tiny)
        assert not torch.equal(classifier.head.fc.weight, tiny.fc.weight)
        assert warned() == []

    @pytest.mark.parametrize('checkpoint', ['timm.pth', 'hf-hub'])
    def test_of_a_classifier(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        file = save_as('timm.pth', tiny, tmp_path)['checkpoint']
        classifier = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='SKNet', depth=26, **NARROW),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=10, in_channels=512),
                pretrained=f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else file,
            )
        )
        classifier.init_weights()
        assert same_state(classifier.backbone, tiny)
        assert torch.equal(classifier.head.fc.weight, tiny.fc.weight)
        assert warned() == []

    @pytest.mark.parametrize('prefix', [{}, dict(prefix='backbone.')], ids=str)
    @pytest.mark.parametrize('kind', ['timm.pth', 'mmengine.safetensors'])
    def test_local_of_another_depth(self, tmp_path, kind, prefix):
        """A warning would be lost, and frozen stages would stay random."""
        init_cfg = {**save_as(kind, make_timm(layers=(1, 1, 1, 3)), tmp_path), **prefix}
        with pytest.raises(CheckpointError) as caught:
            initialise(init_cfg, frozen_stages=1)
        path = re.escape(init_cfg['checkpoint'])
        missing = r'layer1\.1\.conv1\.conv\.weight is missing; .*; .* and \d+ more'
        assert re.fullmatch(f'{path}: its weights do not fit this SKNet of depth 26: {missing}', str(caught.value))

    def test_local_without_weights(self, tmp_path):
        torch.save(dict(model={'conv1.weight': torch.ones(1)}, epoch=1), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'x\.pth: its weights do not fit .* bn1\.weight is missing; '):
            initialise(dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))

    def test_load_from_with_another_head_warns_as_everywhere(self, tmp_path, warned):
        """A head is mmengine's matter. And so it is seen that ``warned`` sees."""
        file = save_as('timm.pth', make_timm(num_classes=7), tmp_path)['checkpoint']
        load_checkpoint(get_classifier(), file, map_location='cpu', logger='current')
        (message,) = warned()
        assert 'size mismatch for head.fc.weight' in message
        assert 'backbone.' not in message

    @pytest.mark.parametrize('repo', ['', 'tiny', 'me/tiny@', 'me/tiny/x'])
    def test_hf_hub_needs_owner_and_name(self, repo):
        with pytest.raises(ValueError, match='must be OWNER/NAME or OWNER/NAME@REVISION') as error:
            initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'))
        assert repr(repo) in str(error.value)


class TestStateDicts:
    """torch's and mmengine's loading, strict, of timm's names and of mmpretrain's."""

    def test_of_a_backbone(self, tiny):
        state_dict = tiny.state_dict()
        model = make_backbone(seed=1)
        model.load_state_dict(state_dict, strict=True)
        assert same_state(model, tiny)
        assert 'fc.weight' in state_dict

    @pytest.mark.parametrize('to_names', [dict, to_mmpretrain], ids=['timm', 'mmpretrain'])
    def test_of_a_classifier(self, tiny, to_names):
        state_dict = to_names(tiny.state_dict())
        names = list(state_dict)
        classifier = get_classifier()
        classifier.load_state_dict(state_dict, strict=True)
        assert list(state_dict) == names
        assert same_state(classifier.backbone, tiny)
        assert list(classifier.state_dict()) == list(to_mmpretrain(tiny.state_dict()))

    @pytest.mark.parametrize('checkpoint', [*TIMM_FILES, 'mmengine.pth', 'hf-hub'])
    def test_load_checkpoint(self, hub, tmp_path, tiny, checkpoint, warned):
        """As the Runner's ``load_from`` does."""
        hub.add(REPO, weights(tiny))
        name = f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)['checkpoint']
        classifier = get_classifier()
        load_checkpoint(classifier, name, map_location='cpu', strict=True)
        with torch.no_grad():
            assert_close(classifier(make_input()), tiny(make_input()), length=tiny)
        assert warned() == []

    def test_missing_and_unexpected_are_still_reported(self, tiny):
        state_dict = tiny.state_dict()
        state_dict['extra.weight'] = state_dict.pop('conv1.weight')
        with pytest.raises(RuntimeError, match=r'(?s)Missing.*conv1.weight.*Unexpected.*extra.weight'):
            make_backbone().load_state_dict(state_dict, strict=True)


class TestWeightsOfEveryBackbone:
    @pytest.mark.parametrize('kind', ['timm.pth', 'mmengine.safetensors', 'hf-hub'])
    def test_init_cfg(self, hub, tmp_path, case, kind, warned):
        model = make_timm(case=case)
        hub.add(REPO, weights(model))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = hf_hub if kind == 'hf-hub' else save_as(kind, model, tmp_path)
        backbone = MODELS.build({**case.cfg, 'init_cfg': init_cfg})
        backbone.init_weights()
        assert same_state(backbone, model)
        assert warned() == []

    @pytest.mark.parametrize('kind', ['timm.safetensors', 'mmengine.pth'])
    def test_of_a_classifier(self, tmp_path, any_case, kind, warned):
        model = settle(make_timm(case=any_case), any_case.size)
        classifier = make_classifier(any_case)
        checkpoint = save_as(kind, model, tmp_path)['checkpoint']
        load_checkpoint(classifier, checkpoint, map_location='cpu', strict=True)
        assert_same_logits(classifier, model, any_case.size, torch.float64)  # few channels amplify rounding
        assert warned() == []

    @pytest.mark.parametrize(
        ('name', 'saved', 'cause'),
        [
            (
                'SKNet-29',
                'SKNet-29-plain',
                'this SKNet of depth 29: layer1.0.conv1.conv.weight is missing; .* and [0-9]+ more',
            ),
            ('SKResNeXt', 'SKNet-29', 'this SKResNeXt of depth 26: layer4.0.conv1.conv.weight is missing; .* more'),
            ('SKResNet-18', 'SKNet', 'this SKResNet of depth 18: layer1.0.conv1.paths.0.conv.weight is missing'),
            (
                'SKShuffleNetV2',
                'SKShuffleNetV2-plain',
                "this SKShuffleNetV2 of widen factor 0.5 and unit 'sk': "
                'stage2.1.branch2.3.paths.0.conv.weight is missing; .* and [0-9]+ more',
            ),
            (
                'SKShuffleNetV2-plain',
                'SKShuffleNetV2-se',
                "this SKShuffleNetV2 of widen factor 0.5 and unit 'plain': "
                'stage2.0.branch2.8.fc1.weight is not part of it; .* and [0-9]+ more',
            ),
        ],
    )
    def test_of_another_network(self, hub, name, saved, cause):
        hub.add(REPO, weights(make_timm(case=ALL_CASES[saved])))
        case = ALL_CASES[name]
        backbone = MODELS.build({**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')})
        with pytest.raises(HubError, match=f'^{REPO}: its weights do not fit {cause}'):
            backbone.init_weights()
