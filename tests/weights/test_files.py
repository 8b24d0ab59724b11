"""Checkpoints of both worlds: what is read, what is refused, and that nothing changes on the way."""

import argparse
import errno
import io
import json
import os
import pickle

import pytest

pytest.importorskip('mmpretrain')

import safetensors.torch
import timm
import torch
from helpers.weight_files import TINY, RunsCode, assert_identical, differ, saved
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint
from mmpretrain.registry import MODELS
from mmpretrain.utils import register_all_modules

from sk_plugins._resources import find_config
from sk_plugins.weights import (
    CheckpointError,
    load_checkpoint,
    save_hub_folder,
    save_mmengine_checkpoint,
    save_state_dict,
    timm_arguments,
    to_mmpretrain,
)


@pytest.fixture(scope='module')
def model():
    """A small network whose BatchNorm statistics are no longer what they are right after init."""
    torch.manual_seed(0)
    model = timm.create_model('sknet26', num_classes=10, **TINY)
    with torch.no_grad():
        model.train()(torch.randn(8, 1, 16, 16))
    return model.eval()


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    """``train(ema)``: the Runner after an epoch of three iterations of sknet_digits, and its checkpoint."""
    register_all_modules()

    def run(ema):
        cfg = Config.fromfile(find_config('sknet_digits'))
        cfg.merge_from_dict(
            {
                'work_dir': str(tmp_path_factory.mktemp('ema' if ema else 'plain')),
                'experiment_name': f'checkpoints_{ema}',
                'train_dataloader.batch_size': 16,
                'train_dataloader.dataset.indices': 48,
                'val_dataloader.dataset.indices': 20,
                'test_dataloader.dataset.indices': 20,
                'train_cfg.max_epochs': 1,
                'default_hooks.checkpoint.save_best': None,
                'custom_hooks': [dict(type='EMAHook', momentum=0.2)] if ema else [],
            }
        )
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner, os.path.join(runner.work_dir, 'epoch_1.pth')

    return run


@pytest.fixture(scope='module')
def plain_run(train):
    return train(ema=False)


@pytest.fixture(scope='module')
def ema_run(train):
    return train(ema=True)


# Reading


def test_safetensors(model, tmp_path):
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    state_dict, meta = load_checkpoint(path)
    assert dict(state_dict).keys() == model.state_dict().keys()
    assert not differ(model.state_dict(), state_dict)
    assert meta == {}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_state_dict_of_torch_save(model, tmp_path, key, zipped):
    path = tmp_path / 'model.pth'
    torch.save({key: model.state_dict()} if key else model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    state_dict, meta = load_checkpoint(str(path))
    assert_identical(state_dict, model.state_dict())
    assert meta == {}


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
def test_wrappers_prefixes_are_removed(model, tmp_path, prefix):
    torch.save({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / 'model.pth')
    assert_identical(load_checkpoint(tmp_path / 'model.pth')[0], model.state_dict())


def test_timm_training_checkpoint(model, tmp_path):
    """As timm's CheckpointSaver writes it, arguments and optimizer state included."""
    averaged = {k: v + 1 for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint = dict(
        epoch=3,
        arch='sknet26',
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        version=2,
        args=argparse.Namespace(model='sknet26', lr=0.1, betas=(0.9, 0.999)),
        state_dict_ema=averaged,
        metric=81.5,
    )
    path = tmp_path / 'checkpoint-3.pth.tar'
    torch.save(checkpoint, path)
    assert_identical(load_checkpoint(path)[0], averaged)
    assert_identical(load_checkpoint(path, use_ema=False)[0], model.state_dict())
    del checkpoint['state_dict_ema']
    torch.save(checkpoint, path)
    assert_identical(load_checkpoint(path)[0], model.state_dict())


def test_mmengine_checkpoint(plain_run):
    runner, path = plain_run
    # It holds what torch will not load by itself, or this test shows nothing.
    assert any('HistoryBuffer' in name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path))
    for use_ema in (True, False):
        state_dict, meta = load_checkpoint(path, use_ema=use_ema)
        assert_identical(state_dict, runner.model.state_dict())
    assert meta['epoch'] == 1
    assert meta['iter'] == 3
    assert tuple(meta['dataset_meta']['classes']) == tuple('0123456789')


def test_mmengine_checkpoint_with_ema(ema_run):
    runner, path = ema_run
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    averaged, trained = hook.ema_model.module.state_dict(), hook.src_model.state_dict()
    assert len(differ(averaged, trained)) > 50
    # mmengine swaps the two as it saves.
    checkpoint = torch.load(path, weights_only=False)
    assert_identical(checkpoint['state_dict'], averaged)
    assert not differ(trained, {k.removeprefix('module.'): v for k, v in checkpoint['ema_state_dict'].items()})
    assert_identical(load_checkpoint(path)[0], averaged)
    assert_identical(load_checkpoint(path, use_ema=False)[0], trained)


# What is refused


def payloads(marker):
    return {
        'os.system': RunsCode(os.system, f'mkdir {marker}'),
        'os.mkdir': RunsCode(os.mkdir, str(marker)),
        'exec': RunsCode(exec, f'import os; os.mkdir({str(marker)!r})'),
    }


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
@pytest.mark.parametrize('place', ['whole', 'state_dict', 'tensor', 'name', 'meta', 'optimizer'])
@pytest.mark.parametrize('payload', ['os.system', 'os.mkdir', 'exec'])
def test_pickle_runs_nothing(model, tmp_path, payload, place, zipped):
    marker = tmp_path / 'marker'
    evil = payloads(marker)[payload]
    weights = model.state_dict()
    checkpoint = {
        'whole': evil,
        'state_dict': dict(state_dict=evil),
        'tensor': dict(state_dict={**weights, 'conv1.weight': evil}),
        'name': dict(state_dict={**weights, ('conv1', 'weight'): evil}),
        'meta': dict(state_dict=weights, meta=evil),
        'optimizer': dict(state_dict=weights, optimizer=evil),
    }[place]
    path = tmp_path / 'model.pth'
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    try:
        state_dict, meta = load_checkpoint(path)
    except CheckpointError as error:
        said = str(error)
    else:
        # torch refuses some functions wherever they are; others, beside the weights, are passed over.
        assert place in ('meta', 'optimizer')
        assert_identical(state_dict, weights)
        assert meta == {}
        said = str(path)
    assert said.startswith(str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the payload works


def test_plain_pickle_runs_nothing(tmp_path):
    marker = tmp_path / 'marker'
    path = tmp_path / 'model.pth'
    path.write_bytes(pickle.dumps(RunsCode(os.mkdir, str(marker))))
    with pytest.raises(CheckpointError, match=r'model\.pth'):
        load_checkpoint(path)
    assert not marker.exists()


WEIGHTS = {'conv1.weight': torch.arange(108.0).reshape(4, 3, 3, 3), 'fc.bias': torch.zeros(5)}
WHOLE = {
    'zip': saved(WEIGHTS),
    'legacy': saved(WEIGHTS, _use_new_zipfile_serialization=False),
    'safetensors': safetensors.torch.save(WEIGHTS),
}
TEXT = {
    'empty': b'',
    'readme': b'# A model card\n',
    'html': b'<!doctype html><title>404</title>\n',
    'lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
    'hello': b'hello world\n',
    'letter': b'h',
    'zeros': bytes(64),
    'zip header': b'PK\x03\x04',
}


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
@pytest.mark.parametrize('content', TEXT.values(), ids=TEXT.keys())
def test_file_that_is_no_checkpoint(tmp_path, content, ending):
    path = tmp_path / f'model.{ending}'
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    # The file, and some reason after it.
    assert len(str(caught.value).removeprefix(str(path))) > 10
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize('kind', WHOLE)
def test_truncated_file(tmp_path, kind):
    path = tmp_path / ('model.safetensors' if kind == 'safetensors' else 'model.pth')
    whole = WHOLE[kind]
    path.write_bytes(whole)
    assert_identical(dict(sorted(load_checkpoint(path)[0].items())), WEIGHTS)
    for length in range(1, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)


@pytest.mark.parametrize('kind', WHOLE)
def test_damaged_file(tmp_path, kind):
    """What is damaged either loads all the same (a weight's own bytes) or is a CheckpointError, never another."""
    path = tmp_path / ('model.safetensors' if kind == 'safetensors' else 'model.pth')
    refused = 0
    for position in range(0, len(WHOLE[kind]), 7):
        damaged = bytearray(WHOLE[kind])
        damaged[position] ^= 0xA5
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    'checkpoint',
    [
        [torch.zeros(1)],
        torch.zeros(1),
        {},
        {'epoch': 3, 'arch': 'sknet26'},
        {'state_dict': {}},
        {'state_dict': [torch.zeros(1)]},
        {'state_dict': 5, 'ema_state_dict': {'module.a': torch.zeros(1)}},
        {'state_dict': {'conv1.weight': 'text'}},
        {1: torch.zeros(1)},
    ],
    ids=lambda checkpoint: repr(checkpoint)[:40],
)
def test_no_state_dict(tmp_path, checkpoint):
    path = tmp_path / 'model.pth'
    torch.save(checkpoint, path)
    for use_ema in (True, False):
        with pytest.raises(CheckpointError, match=r'model\.pth: holds no state dict of tensors'):
            load_checkpoint(path, use_ema=use_ema)


@pytest.mark.parametrize('name', ['gone.pth', 'gone.safetensors', '.'])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='no such checkpoint file'):
        load_checkpoint(tmp_path / name)


# Writing


@pytest.mark.parametrize('name', ['model.safetensors', 'model.pth', 'new/folder/model.bin'])
def test_save_state_dict(model, tmp_path, name):
    path = tmp_path / name
    weights = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in model.state_dict().items()}
    save_state_dict(weights, path)
    assert not differ(model.state_dict(), load_checkpoint(path)[0])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_failed_write_leaves_nothing(model, tmp_path, monkeypatch, ending):
    path = tmp_path / f'model.{ending}'
    path.write_bytes(b'before')

    def write_half(obj, target, *args, **kwargs):
        target.write(b'half') if isinstance(target, io.BytesIO) else target.write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'disk full')

    monkeypatch.setattr(torch, 'save', write_half)
    monkeypatch.setattr(safetensors.torch, 'save_file', write_half)
    with pytest.raises(OSError, match='disk full'):
        save_state_dict(model.state_dict(), path)
    if ending == 'pth':
        with pytest.raises(OSError, match='disk full'):
            save_mmengine_checkpoint(model.state_dict(), path)
    assert path.read_bytes() == b'before'
    assert list(tmp_path.iterdir()) == [path]


def test_failed_folder_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, 'disk full')

    monkeypatch.setattr('sk_plugins.weights.hub._model_card', fail)
    (tmp_path / 'hub').mkdir()
    with pytest.raises(OSError, match='disk full'):
        save_hub_folder(model.state_dict(), tmp_path / 'hub', 'sknet26', dict(num_classes=10, **TINY))
    assert list(tmp_path.rglob('*')) == [tmp_path / 'hub']


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_hub_folder_refuses_what_exists(model, tmp_path, kind):
    folder = tmp_path / 'hub'
    kept = folder if kind == 'file' else folder / 'notes.txt'
    kept.parent.mkdir(exist_ok=True)
    kept.write_text('mine')
    with pytest.raises(FileExistsError, match=r'hub: exists and is not empty'):
        save_hub_folder(model.state_dict(), folder, 'sknet26', dict(num_classes=10, **TINY))
    assert kept.read_text() == 'mine'
    assert len(list(tmp_path.rglob('*'))) == (1 if kind == 'file' else 2)


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        (dict(num_classes=7), r'fc\.weight'),
        (dict(in_chans=3), r'conv1\.weight'),
        (dict(layers=(1, 1, 1, 2)), r'layer4\.1\.'),
    ],
    ids=str,
)
def test_hub_folder_of_weights_that_do_not_fit(model, tmp_path, wrong, said):
    args = {'num_classes': 10, **TINY, **wrong}
    with pytest.raises(CheckpointError, match=rf'the weights do not fit sknet26 with [\s\S]*{said}'):
        save_hub_folder(model.state_dict(), tmp_path / 'hub', 'sknet26', args)
    assert list(tmp_path.iterdir()) == []


# From a training run to timm and back


@pytest.fixture(scope='module')
def hub_folder(ema_run, tmp_path_factory):
    """The Hub folder of the averaged weights of ``ema_run``."""
    runner, path = ema_run
    folder = tmp_path_factory.mktemp('hub') / 'sknet_digits'
    state_dict, meta = load_checkpoint(path)
    architecture, model_args, data_config = timm_arguments(runner.cfg)
    save_hub_folder(
        state_dict,
        folder,
        architecture,
        model_args,
        data_config,
        label_names=list(meta['dataset_meta']['classes']),
        description='Digits, briefly.',
    )
    return folder


@pytest.fixture
def classifier(ema_run):
    """mmpretrain's own model of ``ema_run``'s checkpoint, loaded by mmengine."""
    runner, path = ema_run
    classifier = MODELS.build(runner.cfg.model)
    classifier.load_state_dict(load_checkpoint(path)[0], strict=True)
    return classifier.eval()


def test_hub_folder_is_whole(hub_folder):
    assert sorted(p.name for p in hub_folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert [p.name for p in hub_folder.parent.iterdir()] == ['sknet_digits']
    config = json.loads((hub_folder / 'config.json').read_text())
    assert config['architecture'] == 'sknet26'
    assert config['num_classes'] == 10
    assert config['label_names'] == list('0123456789')
    assert config['model_args']['in_chans'] == 1
    assert config['model_args']['small_stem'] is True
    assert config['model_args']['channels'] == [16, 32, 64, 128]
    pretrained_cfg = config['pretrained_cfg']
    assert pretrained_cfg['input_size'] == [1, 16, 16]
    assert pretrained_cfg['mean'] == pytest.approx([77.8 / 255])
    assert pretrained_cfg['std'] == pytest.approx([95.9 / 255])
    assert pretrained_cfg['interpolation'] == 'bicubic'
    assert pretrained_cfg['crop_pct'] == 1.0
    assert pretrained_cfg['description'] == 'Digits, briefly.'
    # Those of published weights would be wrong here.
    assert not pretrained_cfg.keys() & {'hf_hub_id', 'url', 'notes', 'tag', 'file'}


def test_model_card(hub_folder):
    card = (hub_folder / 'README.md').read_text()
    _, front_matter, text = card.split('---\n', 2)
    assert card.startswith('---\n')
    lines = front_matter.splitlines()
    assert 'library_name: timm' in lines
    assert 'pipeline_tag: image-classification' in lines
    assert '- sk-plugins' in lines
    assert '# sknet_digits' in text
    assert 'Digits, briefly.' in text
    assert "timm.create_model('hf-hub:OWNER/sknet_digits', pretrained=True)" in text


def test_timms_logits_are_mmpretrains(hub_folder, classifier):
    model = timm.create_model(f'local-dir:{hub_folder}', pretrained=True).eval()
    assert_identical(to_mmpretrain(model.state_dict()), classifier.state_dict())
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = classifier(images), model(images)
    assert expected.shape == got.shape == (4, 10)
    assert expected.std() > 1e-3
    assert (expected - got).abs().max() < 1e-6


def test_preprocessing_is_mmpretrains(hub_folder, ema_run):
    """The same digit, as timm's transform and as the config's test pipeline with its data_preprocessor give it."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    runner, _ = ema_run
    dataset = runner.val_dataloader.dataset
    packed, image = dataset[5], dataset.get_data_info(5)['img']
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **runner.cfg.data_preprocessor})
    batch = dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
    expected = preprocessor(batch)['inputs'][0]
    model = timm.create_model(f'local-dir:{hub_folder}', pretrained=True)
    got = create_transform(**resolve_data_config(model.pretrained_cfg))(Image.fromarray(image))
    assert got.shape == expected.shape == (1, 16, 16)
    assert (got - expected).abs().max() < 1e-5


def test_hub_folder_back_to_mmengine(hub_folder, ema_run, tmp_path):
    runner, path = ema_run
    state_dict, _ = load_checkpoint(hub_folder / 'model.safetensors')
    _, meta = load_checkpoint(path)
    back = tmp_path / 'back.pth'
    save_mmengine_checkpoint(state_dict, back, meta)
    expected = load_checkpoint(path)[0]
    restored, restored_meta = load_checkpoint(back)
    assert not differ(expected, restored)
    assert set(restored) == set(expected)
    assert restored_meta == meta
    # Nothing in it that torch would refuse.
    torch.load(back, weights_only=True)
    classifier = MODELS.build(runner.cfg.model)
    mmengine_load_checkpoint(classifier, str(back), strict=True)
    assert_identical(classifier.state_dict(), expected)


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    for save in (save_state_dict, save_mmengine_checkpoint):
        with pytest.raises(FileExistsError, match='is a folder; name a file'):
            save({'layer1.0.conv2.weight': torch.zeros(1)}, tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize('name', ['out.safetensors', 'out.pth'])
def test_written_files_can_be_read_by_others(name, tmp_path):
    (tmp_path / 'plain').touch()
    save_state_dict({'conv1.weight': torch.zeros(1)}, tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_errors_do_not_advise_to_run_pickles(tmp_path):
    (tmp_path / 'config.json').write_text('{"architecture": "sknet50"}')
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / 'config.json')
    assert 'weights_only' not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / 'config.json'))


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / 'weights.pth'
    weights = torch.arange(4096.0)
    torch.save({'layer1.weight': weights, 'other': torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(weights[1234:1240].numpy().tobytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert torch.load(path)['layer1.weight'][1234] != 1234, 'torch sees it by now'
    with pytest.raises(CheckpointError, match=r'weights\.pth: damaged: the checksum of weights/data/\d in it is wrong'):
        load_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'layer1.weight': weights}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(path)[0]['layer1.weight'], weights)


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('spoil', [lambda t: t.to_sparse(), lambda t: t.to('meta')], ids=['sparse', 'meta'])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, spoil, suffix):
    path = tmp_path / f'weights{suffix}'
    path.write_bytes(b'before')
    with pytest.raises(CheckpointError, match=r'^b is (sparse|without data)'):
        save_state_dict({'a': torch.ones(3), 'b': spoil(torch.ones(3))}, path)
    assert path.read_bytes() == b'before'
    assert list(tmp_path.iterdir()) == [path]
