"""tools/test.py: its options, and what it measures on checkpoints of tools/train.py."""

import json
import pickle
import shutil

import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.tolerances import assert_close
from mmengine.config import Config

from sk_plugins._resources import find_config
from sk_plugins.weights import CheckpointError, load_checkpoint, save_state_dict, to_timm


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('test')


@pytest.fixture
def merged(tool):
    """``merged(*words)``: the config as the runner gets it."""

    def merge(*words):
        args = tool.parse_args(list(words))
        return tool.merge_args(tool.load_config(args), args)

    return merge


@pytest.fixture
def evaluate(tool, tmp_path):
    """``evaluate(config, checkpoint, *words, options=())``: the metrics of tools/test.py in this process."""
    number = iter(range(100))

    def run(config, checkpoint, *words, options=()):
        name = f'experiment_name={tmp_path.name}_{next(number)}'
        words = [str(word) for word in words]
        return tool.main(
            [config, str(checkpoint), '--work-dir', str(tmp_path), *words, '--cfg-options', name, *options]
        )

    return run


# Options


def test_defaults(merged):
    cfg, untouched = merged('sknet50_in1k', 'x.pth'), Config.fromfile(find_config('sknet50_in1k'))
    assert (cfg.pop('work_dir'), cfg.pop('launcher')) == ('work_dirs/sknet50_in1k', 'none')
    assert cfg.to_dict() == untouched.to_dict()


@pytest.mark.parametrize(('crop', 'short_side'), [(224, 256), (320, 352)])
def test_crop_option(merged, crop, short_side):
    _, resize, centre, _ = merged('sknet50_in1k', 'x.pth', '--crop', str(crop)).test_dataloader.dataset.pipeline
    assert (resize.type, resize.scale, resize.edge) == ('ResizeEdge', short_side, 'short')
    assert (resize.backend, resize.interpolation) == ('pillow', 'bicubic')
    assert (centre.type, centre.crop_size) == ('CenterCrop', crop)


def test_crop_of_another_size(merged, capsys):
    with pytest.raises(SystemExit):
        merged('sknet50_in1k', 'x.pth', '--crop', '256')
    assert 'argument --crop: invalid choice: 256' in capsys.readouterr().err


def test_crop_where_there_is_none(merged):
    with pytest.raises(ValueError, match='--crop 224: the test pipeline has no ResizeEdge and no CenterCrop to set'):
        merged('sknet_digits', 'x.pth', '--crop', '224')


def test_amp_option(merged):
    assert merged('sknet50_in1k', 'x.pth', '--amp').test_cfg == dict(fp16=True)


def test_tta_option(merged):
    cfg = merged('sknet50_in1k', 'x.pth', '--tta', '--crop', '320')
    assert cfg.model.type == 'mmpretrain.AverageClsScoreTTA'
    assert cfg.model.module == Config.fromfile(find_config('sknet50_in1k')).model
    *_, crop, augment = cfg.test_dataloader.dataset.pipeline
    assert (crop.crop_size, augment.type) == (320, 'TestTimeAug')
    flips, pack = augment.transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0]
    assert [t.type for t in pack] == ['PackInputs']
    # The validation pipeline is another object, and stays.
    assert cfg.val_dataloader == Config.fromfile(find_config('sknet50_in1k')).val_dataloader


def test_tta_of_the_config_itself(merged, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        f'_base_ = [{str(find_config("sknet_digits"))!r}]\n'
        "tta_model = dict(type='mmpretrain.AverageClsScoreTTA', data_preprocessor=None)\n"
        "tta_pipeline = [dict(type='TestTimeAug', transforms=[[dict(type='PackInputs')]])]\n"
    )
    cfg = merged(str(path), 'x.pth', '--tta')
    assert [t.type for t in cfg.test_dataloader.dataset.pipeline] == ['TestTimeAug']
    assert 'data_preprocessor' in cfg.model


@pytest.mark.parametrize('out', ['metrics.txt', 'metrics', 'metrics.json.gz'])
def test_bad_ending(merged, out):
    with pytest.raises(ValueError, match=rf'--out {out} must end in \.json \(metrics\) or \.pkl \(predictions\)'):
        merged('sknet50_in1k', 'x.pth', '--out', out)


# What the user can put right


def test_missing_checkpoint(python_tool, tmp_path):
    done = python_tool('test', 'sknet_digits', 'gone.pth', status=1, cwd=tmp_path)
    *_, error, hint = done.stderr.strip().splitlines()
    assert error == 'test.py: error: gone.pth: no such checkpoint file'
    assert hint == '(set SK_PLUGINS_TRACEBACK=1 for the traceback)'
    assert 'Traceback' not in done.stderr


def test_missing_safetensors(evaluate):
    with pytest.raises(FileNotFoundError, match=r'gone\.safetensors: no such checkpoint file'):
        evaluate('sknet_digits', 'gone.safetensors')


def test_unknown_config(evaluate):
    with pytest.raises(FileNotFoundError, match=r"'sknet1_in1k' is neither a file nor .*near it are .*sknet101_in1k"):
        evaluate('sknet1_in1k', 'gone.pth')


# Measuring


def test_digits(evaluate, digits_run, short_digits):
    path = digits_run / 'epoch_2.pth'
    validation = json.loads(next(digits_run.glob('*/vis_data/scalars.json')).read_text().splitlines()[-1])
    assert evaluate('sknet_digits', path, options=short_digits) == {'accuracy/top1': validation['accuracy/top1']}


def test_formats_agree(evaluate, digits_run, short_digits, tmp_path):
    """The checkpoint, and its weights under timm's names in both of timm's formats."""
    state_dict, _ = load_checkpoint(digits_run / 'epoch_2.pth')
    outs = []
    for name in ('epoch_2.pth', 'timm.safetensors', 'timm.pth'):
        path = tmp_path / name
        if name.startswith('timm'):
            save_state_dict(to_timm(state_dict), path)
        else:
            shutil.copy(digits_run / name, path)
        out = tmp_path / f'{path.stem}_{path.suffix[1:]}.pkl'
        evaluate('sknet_digits', path, '--out', out, options=short_digits)
        outs.append(scores_of(out))
    assert outs[0].shape == (20, 10)
    assert outs[0].std(0).max() > 1e-3
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'unknown': torch.zeros(3)}, r'unexpected key in source state_dict: backbone\.unknown'),
        ({'layer1.0.conv2.attn.fc_reduce.weight': None}, r'layer1\.0\.conv2\.attn\.fc_reduce\.weight'),
        ({'fc.bias': torch.zeros(7)}, r'size mismatch for head\.fc\.bias'),
    ],
    ids=['unknown', 'missing', 'shape'],
)
@pytest.mark.parametrize('words', [[], ['--tta']], ids=' '.join)
def test_weights_that_do_not_fit(evaluate, short_digits, digits_run, tmp_path, change, said, words):
    """mmengine would warn, and measure layers at random."""
    weights = to_timm(load_checkpoint(digits_run / 'epoch_2.pth')[0])
    path = tmp_path / 'model.safetensors'
    weights.update(change)
    save_state_dict({k: v for k, v in weights.items() if v is not None}, path)
    with pytest.raises(CheckpointError, match=rf'model\.safetensors: [\s\S]*{said}'):
        evaluate('sknet_digits', path, *words, options=short_digits)


def scores_of(path):
    """A DumpResults file, which is mmengine's pickle, as (images, classes)."""
    return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])


@pytest.mark.parametrize('words', [[], ['--crop', '224'], ['--crop', '320'], ['--tta'], ['--amp']], ids=' '.join)
def test_imagenet(evaluate, imagenet, imagenet_run, tmp_path, words):
    sizes = set()

    def look(module, args):
        if type(module).__name__ == 'SKNet':
            sizes.add(tuple(args[0].shape[1:]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        words = [*words, '--out', tmp_path / 'm.json']
        options = [*imagenet.options, *imagenet.narrow]
        metrics = evaluate('sknet26_in1k', imagenet_run / 'epoch_1.pth', *words, options=options)
    finally:
        handle.remove()
    side = 320 if '320' in words else 224
    assert sizes == {(3, side, side)}
    assert set(metrics) == {'accuracy/top1', 'accuracy/top5'}
    assert json.loads((tmp_path / 'm.json').read_text()) == metrics
    images = metrics['accuracy/top1'] * 6 / 100
    assert images == pytest.approx(round(images), abs=1e-3)


def test_pictures_are_drawn(evaluate, imagenet, imagenet_run, tmp_path):
    words = ['--show-dir', tmp_path / 'pictures']
    options = [*imagenet.options, *imagenet.narrow]
    evaluate('sknet26_in1k', imagenet_run / 'epoch_1.pth', *words, options=options)
    drawn = {str(path.relative_to(tmp_path / 'pictures')) for path in (tmp_path / 'pictures').rglob('*.png')}
    assert drawn == {f'{name}/{name}_{i}.png' for name in imagenet.classes for i in range(3)}


def test_tta_averages_the_mirror_image(evaluate, digits_run, short_digits, tmp_path):
    mirror = tmp_path / 'mirror.py'
    mirror.write_text(
        f'_base_ = [{str(find_config("sknet_digits"))!r}]\n'
        "flip = dict(type='RandomFlip', prob=1.0)\n"
        "pipeline = [_base_.enlarge, flip, dict(type='PackInputs')]\n"
        'test_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
    )
    scores = {}
    for name, config, words in (
        ('plain', 'sknet_digits', []),
        ('mirrored', str(mirror), []),
        ('tta', 'sknet_digits', ['--tta']),
    ):
        out = tmp_path / f'{name}.pkl'
        evaluate(config, digits_run / 'epoch_2.pth', *words, '--out', out, options=short_digits)
        scores[name] = scores_of(out)
    plain, mirrored, tta = scores.values()
    assert plain.shape == (20, 10)
    assert (plain - mirrored).abs().max() > 1e-3
    # The images go through the network in other batches, and so in sums of some thousand terms in all.
    assert_close(tta, (plain + mirrored) / 2, length=4000)


def test_damaged_checkpoint_is_named(evaluate, tmp_path):
    (tmp_path / 'bad.pth').write_bytes(b'no checkpoint')
    with pytest.raises(CheckpointError, match=r'bad\.pth'):
        evaluate('sknet_digits', tmp_path / 'bad.pth')


@pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\nxxxxxxxxxxx', b'hello\n', b'xx'])
def test_file_that_is_no_checkpoint(content, tmp_path):
    path = tmp_path / 'picture.png'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'picture\.png: .*not a file of torch\.save, or a damaged one'):
        load_checkpoint(path)


def test_pickle_runs_no_code(evaluate, digits_run, short_digits, tmp_path):
    class Evil:
        def __reduce__(self):
            return eval, (f'open({str(tmp_path / "marker")!r}, "w").close()',)

    checkpoint = torch.load(digits_run / 'epoch_2.pth', weights_only=False)
    torch.save({**checkpoint, 'extra': Evil()}, tmp_path / 'evil.pth')
    evaluate('sknet_digits', tmp_path / 'evil.pth', options=short_digits)
    assert not (tmp_path / 'marker').exists()
