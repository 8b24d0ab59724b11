"""Published weights at their full size, by name, and what goes wrong on the way to them."""

import io
import re

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import timm
import torch
import torchvision
from helpers.backbone_cases import (
    CASES,
    CHANNELS,
    PUBLISHED,
    REPO,
    SHUFFLE_PARTS,
    Case,
    make_input,
    make_timm,
    weights,
)
from helpers.backbones import (
    TIMM_FILES,
    assert_same_logits,
    get_classifier,
    initialise,
    make_classifier,
    same_state,
    save_as,
    settle,
)
from helpers.hub_server import FAULTS
from helpers.randomised import randomise
from helpers.simclr import as_file
from helpers.tolerances import assert_close
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from PIL import Image

from sk_plugins import zoo
from sk_plugins.mmpretrain_models import SKResNet, SKShuffleNetV2
from sk_plugins.weights import CheckpointError, HubError
from sk_plugins.weights.simclr import to_lightly


@pytest.fixture
def shufflenet_at_pytorch(tmp_path, monkeypatch):
    """ShuffleNetV2 1x where torch keeps what it has downloaded: its name at the given address, and its weights."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    file = zoo.MODELS['shufflenetv2_x1_0'].weights[0].url.rpartition('/')[2]
    published = randomise(torchvision.models.shufflenet_v2_x1_0()).state_dict()
    torch.save(published, tmp_path / 'hub' / 'checkpoints' / file)
    return lambda address: (address + ('shufflenetv2_x1.0' if 'torchvision' in address else file), published)


class TestPublished:
    """Weights of others, at their full size."""

    @pytest.mark.parametrize('depth', [18, pytest.param(34, marks=pytest.mark.slow)])
    def test_skresnet(self, hub, depth, warned):
        model = randomise(timm.create_model(f'skresnet{depth}'))
        repo = f'timm/skresnet{depth}.ra_in1k'
        hub.add(repo, weights(model))
        classifier = mmpretrain.get_model(f'skresnet{depth}_in1k', pretrained=True)
        assert type(classifier.backbone) is SKResNet
        assert same_state(classifier.backbone, model)
        assert_same_logits(classifier, model, size=96)

        strict = MODELS.build(dict(type='SKResNet', depth=depth))
        strict.load_state_dict(model.state_dict(), strict=True)
        assert same_state(strict, model)
        assert [w.hf_hub_id for w in zoo.MODELS[f'skresnet{depth}'].weights] == [repo]
        assert warned() == []

    @pytest.mark.parametrize('revision', ['', '@main'])
    def test_simclr(self, hub, revision, warned):
        """A pickle, which the zoo names, in a backbone, under a head and through load_from; no other is read."""
        case = CASES['SKResNetSimCLR']
        model = make_timm(case=case, num_classes=1000)
        (published,) = zoo.MODELS[case.timm_name].weights
        file = io.BytesIO()
        torch.save(as_file(to_lightly(model.state_dict())), file)
        hub.add(published.hf_hub_id, {published.file: file.getvalue()})
        checkpoint = f'hf-hub:{published.hf_hub_id}{revision}'
        backbone = MODELS.build({**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=checkpoint)})
        backbone.init_weights()
        assert same_state(backbone, model)
        classifier = make_classifier(case, num_classes=1000)
        load_checkpoint(classifier, checkpoint, strict=True)
        assert same_state(classifier.backbone, model)
        assert_same_logits(classifier, model, size=64)
        assert warned() == []

        other = MODELS.build(
            {**case.cfg, 'layers': (2, 1, 1, 1), 'init_cfg': dict(type='Pretrained', checkpoint=checkpoint)}
        )
        with pytest.raises(HubError, match=rf'{published.hf_hub_id}.*SKResNetSimCLR of depth 50: layer1\.1\.'):
            other.init_weights()
        hub.add('me/other', {published.file: file.getvalue()})
        with pytest.raises(HubError, match=r'me/other: the repository has no model\.safetensors'):
            load_checkpoint(classifier, 'hf-hub:me/other')

    @pytest.mark.parametrize('nested', [as_file, dict], ids=['resnet and head', 'their names'])
    def test_a_file_of_lightlys(self, tmp_path, nested, warned):
        case = CASES['SKResNetSimCLR']
        model = make_timm(case=case, num_classes=1000)
        weights = {**to_lightly(model.state_dict()), 'head.layers.0.weight': torch.ones(2, 2)}
        path = str(tmp_path / 'r50_1x_sk1.pth')
        torch.save(nested(weights), path)
        cfg = {**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=path)}
        backbone = MODELS.build(cfg)
        backbone.init_weights()
        assert same_state(backbone, model)
        assert warned() == []
        torch.save({'meta': {}}, path)
        with pytest.raises(CheckpointError, match=r'r50_1x_sk1\.pth: holds no state dict of tensors'):
            MODELS.build(cfg).init_weights()

    def test_skresnet_without_splitting_refuses_them(self, hub):
        model = timm.create_model('skresnet18')
        repo = 'timm/skresnet18.ra_in1k'
        hub.add(repo, weights(model))
        backbone = SKResNet(18, split_input=False, init_cfg=dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'))
        with pytest.raises(HubError) as caught:
            backbone.init_weights()
        assert str(caught.value) == (
            f'{repo}: its weights do not fit this SKResNet of depth 18: layer1.0.conv1.paths.0.conv.weight is '
            '(64, 32, 3, 3), not (64, 64, 3, 3); layer1.0.conv1.paths.1.conv.weight is (64, 32, 3, 3), not '
            '(64, 64, 3, 3); layer1.1.conv1.paths.0.conv.weight is (64, 32, 3, 3), not (64, 64, 3, 3) and 13 more'
        )
        with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.0\.conv1\.paths\.0\.conv\.weight'):
            backbone.load_state_dict(model.state_dict(), strict=True)

    @pytest.mark.parametrize('factor', [0.5, 1.0])
    def test_torchvisions_shufflenet(self, tmp_path, factor, warned):
        name = f'x{str(factor).replace(".", "_")}'
        model = settle(randomise(getattr(torchvision.models, f'shufflenet_v2_{name}')()))
        torch.save(model.state_dict(), tmp_path / 'torchvision.pth')
        case = Case(dict(type='SKShuffleNetV2', widen_factor=factor, unit='plain'), '', {}, [1024], [], SHUFFLE_PARTS)
        classifier = make_classifier(case, 1000)
        load_checkpoint(classifier, str(tmp_path / 'torchvision.pth'), map_location='cpu', strict=True)
        assert same_state(classifier.backbone, model)
        assert_same_logits(classifier, model)

        overlay = dict(file=str(tmp_path / 'torchvision.pth'))
        at_timms = timm.create_model(f'shufflenetv2_{name}', pretrained=True, pretrained_cfg_overlay=overlay)
        assert_same_logits(at_timms, model)
        backbone = MODELS.build({**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=overlay['file'])})
        backbone.init_weights()
        assert same_state(backbone, model)
        assert warned() == []

    @pytest.mark.parametrize(
        ('cfg', 'counts'),
        [(dict(unit='sk', frozen_stages=0), (258, 505)), (dict(unit='se', frozen_stages=-1), (336, 400))],
        ids=['sk', 'se'],
    )
    @pytest.mark.parametrize('address', ['https://download.pytorch.org/models/', 'torchvision://'])
    def test_torchvisions_shufflenet_in_other_units(self, shufflenet_at_pytorch, address, cfg, counts):
        checkpoint, published = shufflenet_at_pytorch(address)
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
        backbone = SKShuffleNetV2(1.0, init_cfg=init_cfg, **cfg)
        backbone.init_weights()
        state_dict = backbone.state_dict()
        loaded = {k for k, v in state_dict.items() if k in published and torch.equal(v, published[k])}
        assert (len(loaded), len(state_dict)) == counts
        assert {k for k in state_dict if not re.match(r'stage\d\.\d+\.branch2\.[348]\.', k)} <= loaded

    @pytest.mark.parametrize(
        ('cfg', 'cause'),
        [
            (dict(unit='sk', frozen_stages=1), 'stage2.1.branch2.3.paths.0.conv.weight is missing; .* and 45 more'),
            (dict(unit='se', frozen_stages=1), 'stage2.0.branch2.8.fc1.weight is missing; .* and 13 more'),
            (
                dict(unit='sk', widen_factor=0.5),
                r'stage2.0.branch1.2.weight is \(58, 24, 1, 1\), not \(24, .* and 198 more',
            ),
            (dict(unit='sk', layers=(4, 8, 5)), 'stage4.4.branch2.0.weight is missing; .*'),
        ],
        ids=['frozen-sk', 'frozen-se', 'width', 'depth'],
    )
    def test_torchvisions_shufflenet_does_not_fit(self, shufflenet_at_pytorch, cfg, cause):
        checkpoint, _ = shufflenet_at_pytorch('https://download.pytorch.org/models/')
        backbone = SKShuffleNetV2(**cfg, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
        with pytest.raises(
            CheckpointError, match=f'^{checkpoint}: its weights do not fit this SKShuffle.*: .*{cause}$'
        ):
            backbone.init_weights()

    def test_torchvisions_shufflenet_of_another_width(self):
        model = torchvision.models.shufflenet_v2_x0_5()
        with pytest.raises(RuntimeError, match=r'size mismatch for backbone\.stage2\.0\.branch1\.2\.weight'):
            mmpretrain.get_model('shufflenetv2_x1_0_in1k').load_state_dict(model.state_dict(), strict=True)


class TestGetModel:
    def test_pretrained(self, hub, published, warned, recwarn):
        hub.add(PUBLISHED, published)
        model = mmpretrain.get_model('sknet50_in1k', pretrained=True)
        assert warned() == []
        assert not [str(w.message) for w in recwarn if 'checkpoint' in str(w.message)]
        expected = timm.create_model('sknet50', pretrained=True).eval()
        assert not model.training
        x = make_input(2, size=224)
        with torch.no_grad():
            logits = model(x)
            assert_close(logits, expected(x), length=model)
        assert logits.shape == (2, 1000)
        assert logits.std() > 1e-3
        assert len(list(hub.cache.glob('models--*/blobs/*'))) == 1

    def test_pretrained_with_other_classes(self, hub, sknet50, published, warned):
        hub.add(PUBLISHED, published)
        model = mmpretrain.get_model('sknet50_in1k', pretrained=True, head=dict(num_classes=10, topk=(1, 5)))
        assert same_state(model.backbone, sknet50)
        assert model.head.fc.weight.shape == (10, 2048)
        said = '\n'.join(warned())
        assert 'size mismatch for head.fc.weight' in said
        assert 'backbone' not in said
        assert 'missing' not in said
        assert 'unexpected' not in said

    @pytest.mark.parametrize('checkpoint', [*TIMM_FILES, 'mmengine.pth', 'hf-hub'])
    def test_pretrained_names_a_checkpoint(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        name = f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)['checkpoint']
        model = get_classifier(pretrained=name)
        with torch.no_grad():
            assert_close(model(make_input()), tiny(make_input()), length=model)
        assert warned() == []

    def test_without_published_weights(self):
        with pytest.warns(UserWarning, match='Unable to find pre-defined checkpoint'):
            mmpretrain.get_model('sknet26_in1k', pretrained=True)

    def test_unknown(self):
        with pytest.raises(ValueError, match='Failed to find model "sknet51_in1k"'):
            mmpretrain.get_model('sknet51_in1k')

    def test_features_of_every_stage(self):
        model = get_classifier(out_indices=(0, 1, 2, 3))
        with torch.no_grad():
            assert [y.shape for y in model.extract_feat(make_input(1))] == [(1, c) for c in CHANNELS]


@pytest.fixture(scope='module')
def photo():
    """Of no side that the resize would keep, and smooth, as photographs are."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


class TestInferencer:
    def test_is_timms(self, hub, tmp_path, sknet50, published, photo):
        """From the file to the scores: the preprocessing is the published weights' own."""
        hub.add(PUBLISHED, published)
        photo.save(tmp_path / 'photo.png')
        inferencer = mmpretrain.ImageClassificationInferencer('sknet50_in1k', pretrained=True, device='cpu')
        (result,) = inferencer(str(tmp_path / 'photo.png'))

        data_config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg('sknet50').to_dict())
        transform = timm.data.create_transform(**data_config)
        with torch.no_grad():
            logits = sknet50(transform(photo)[None])[0]
        scores = logits.softmax(0)
        assert scores.max() > 1.5 * scores.mean()  # or any two classifiers would agree
        # A softmax makes the logits' own error a relative one.
        found = torch.tensor(result['pred_scores'])
        assert_close(found, scores, length=sknet50, gain=logits.abs().max().item())
        assert result['pred_label'] == scores.argmax().item()
        assert result['pred_class'] == mmpretrain.datasets.ImageNet.METAINFO['classes'][result['pred_label']]

    def test_array_is_the_file(self, tmp_path, photo, tiny):
        photo.save(tmp_path / 'photo.png')
        model = get_classifier()
        model.load_state_dict(tiny.state_dict())
        inferencer = mmpretrain.ImageClassificationInferencer(model, device='cpu', classes=[f'c{i}' for i in range(10)])
        bgr = np.ascontiguousarray(np.asarray(photo)[..., ::-1])
        results = inferencer([str(tmp_path / 'photo.png'), bgr], batch_size=2)
        assert len(results) == 2
        np.testing.assert_array_equal(results[0]['pred_scores'], results[1]['pred_scores'])
        for result in results:
            assert result['pred_class'] == f'c{result["pred_label"]}'
            assert result['pred_score'] == result['pred_scores'].max()

    def test_inference_model(self, photo, tiny):
        model = get_classifier()
        model.load_state_dict(tiny.state_dict())
        result = mmpretrain.inference_model(model, np.asarray(photo))
        assert result['pred_scores'].shape == (10,)
        assert result['pred_class'] in mmpretrain.datasets.ImageNet.METAINFO['classes'][:10]


def load_by_init_cfg(repo=REPO, **kwargs):
    return initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'), **kwargs)


def load_by_get_model(repo=REPO, **kwargs):
    return get_classifier(f'hf-hub:{repo}', **kwargs).backbone


@pytest.fixture(params=[load_by_init_cfg, load_by_get_model], ids=['init_cfg', 'get_model'])
def load(request):
    return request.param


def fails(load, repo, cause, **kwargs):
    with pytest.raises(HubError, match=cause) as error:
        load(repo, **kwargs)
    message = str(error.value)
    assert message.startswith(f'{repo}: ')
    assert '\n' not in message
    assert len(message) < 600


class TestFaults:
    """What the errors of tests/weights/test_hub.py become on their way through mmengine."""

    @pytest.mark.parametrize(
        ('fault', 'cause'),
        [
            ('missing', 'repository not found, or private .*HTTP 404: Repository not found'),
            ('unauthorized', 'repository not found, or private .*HTTP 401: Invalid username or password'),
            ('garbage', 'model.safetensors is not a safetensors file .*removed from the cache'),
        ],
    )
    def test_fault(self, hub, tiny, load, fault, cause):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = FAULTS[fault]
        fails(load, REPO, cause)
        assert not list(hub.cache.glob('models--*/snapshots/*/*'))
        hub.faults.clear()
        assert same_state(load(), tiny)

    def test_truncated(self, hub, tiny):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = FAULTS['truncated']
        fails(load_by_get_model, REPO, 'the download failed: ')
        assert not list(hub.cache.glob('models--*/snapshots/*/*'))
        hub.faults.clear()
        assert same_state(load_by_get_model(), tiny)

    def test_refused(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        hub.stop()
        fails(load, REPO, 'not in the local cache and the Hub did not give it .*[Cc]onnection refused')
        hub.start()
        assert same_state(load(), tiny)

    def test_unknown_revision(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        fails(load, f'{REPO}@v2', 'the repository has no such revision')
        hub.add(REPO, weights(tiny), 'v2')
        assert same_state(load(f'{REPO}@v2'), tiny)

    @pytest.mark.parametrize(
        ('saved', 'cause'),
        [
            (dict(layers=(1, 2, 2, 2)), r'layer1.1.conv1.conv.weight is missing; .* and \d+ more'),
            (dict(layers=(2, 2, 2, 3)), 'layer4.2.conv1.conv.weight is not part of it'),
            (
                dict(channels=(16, 32, 64, 96)),
                r'layer4.0.conv1.conv.weight is \(192, 256, 1, 1\), not \(256, 256, 1, 1',
            ),
            (dict(in_chans=1), r'conv1.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)$'),
        ],
        ids=['missing', 'unexpected', 'narrower', 'grey'],
    )
    def test_wrong_shapes(self, hub, tiny, load, saved, cause):
        hub.add(REPO, weights(make_timm(**saved)))
        fails(load, REPO, f'its weights do not fit this SKNet of depth 26: .*{cause}')
        hub.add(REPO, weights(tiny))
        assert same_state(load(), tiny)

    def test_of_a_named_model(self, hub, published, sknet50):
        hub.faults[PUBLISHED] = FAULTS['missing']
        fails(lambda _: mmpretrain.get_model('sknet50_in1k', pretrained=True), PUBLISHED, 'HTTP 404')
        hub.faults.clear()
        hub.add(PUBLISHED, published)
        assert same_state(mmpretrain.get_model('sknet50_in1k', pretrained=True).backbone, sknet50)
