"""What the tools say of configs and checkpoints that cannot be used, and what they leave as it was."""

import contextlib
import functools
import http.server
import os
import re
import resource
import shutil
import subprocess
import sys
import threading

import pytest

pytest.importorskip('mmpretrain')

import torch
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner

from sk_plugins._resources import find_config
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.openmmlab.runtime.loading import load_from_http, load_from_local
from sk_plugins.weights import CheckpointError, load_checkpoint, load_third_party, save_state_dict, to_timm

NO_FILES = ('default_hooks.checkpoint.interval=-1', 'default_hooks.checkpoint.save_last=False')
NARROW = ('model.backbone.layers=1,1,1,1',)
IN_THIS_PROCESS = ('train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False')


@pytest.fixture(scope='module')
def start(train, short_digits):
    """``start(work_dir, *options, arguments=())``: an epoch of two iterations without validation, in this process."""

    def run(work_dir, *options, arguments=(), files=()):
        options = [*short_digits, *NARROW, *IN_THIS_PROCESS, 'train_cfg.max_epochs=1', *options, *(files or NO_FILES)]
        arguments = ['--no-validate', *arguments]
        return train('sknet_digits', work_dir, *options, 'train_dataloader.dataset.indices=32', arguments=arguments)

    return run


@pytest.fixture
def without_training(monkeypatch):
    """All is built and loaded, and no step is made."""
    monkeypatch.setattr(EpochBasedTrainLoop, 'run', lambda loop: loop.runner.model)


@pytest.fixture(scope='module')
def run(start, tmp_path_factory):
    """The work dir of one such epoch."""
    return start(tmp_path_factory.mktemp('run'), files=['default_hooks.checkpoint.interval=1'])


@pytest.fixture(scope='module')
def checkpoint(run):
    return torch.load(run / 'epoch_1.pth', weights_only=False)


# Configs


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['model.backbone.dept=26'], r'model\.backbone\.dept: TypeError: SKNet has no argument dept=26'),
        (['default_hooks.timer.type=Timr'], r"default_hooks\.timer\.type='Timr': mmengine knows no hook"),
        (['default_hooks.checkpoint.intervall=1'], r'checkpoint\.intervall: \w+ has no such argument; .* interval'),
        (['randomness.sed=1'], r'randomness\.sed: TypeError'),
        (['train_dataloader.dataset.pipeline.0.type=Resise'], r"pipeline\.0\.type='Resise': mmengine knows no transf"),
        (['optim_wrapper.optimizer.type=SDG'], r"optimizer\.type='SDG': mmengine knows no optimizer .* near it is SGD"),
        (['param_scheduler.0.begn=3'], r'param_scheduler\.0\.begn: TypeError'),
        (['train_cfg.max_epoch=3'], r'train_cfg\.max_epoch: TypeError'),
        (['train_cfg.max_epochs=x'], r"train_loop: invalid literal for int\(\) with base 10: 'x'"),
        (['train_dataloder.batch_size=1'], r'the config has no train_dataloder; near it are train_dataloader'),
        (['env_cfg.cudnn_benchmrk=True'], r'env_cfg\.cudnn_benchmrk: there are only cudnn_benchmark'),
        (
            ['optim_wrapper.paramwise_cfg.norm_decay_mul=0'],
            r'paramwise_cfg\.norm_decay_mul: there are only .*decay_mult',
        ),
        (['optim_wrapper.clip_grad.max_nrm=1'], r'clip_grad\.max_nrm: there are only .*max_norm'),
        (['compile.mod=3'], r'compile\.mod: there are only .*mode'),
        (['train_dataloader.batch_size=0'], r'^train_dataloader: batch_size should be a positive integer'),
        (
            ['train_dataloader.dataset.pipeline.9.type=x'],
            r'--cfg-options: KeyError: Index 9 exceeds the length of list',
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_wrong_config(start, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        start(tmp_path, *options)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.usefixtures('without_training')
@pytest.mark.parametrize('option', ['default_hooks.checkpoint=None', 'default_hooks=None'])
def test_no_validation_and_no_checkpoint(load_tool, option, tmp_path):
    words = ['sknet_digits', '--work-dir', str(tmp_path), '--no-validate', '--cfg-options', *NARROW, option]
    load_tool('train').main([*words, f'experiment_name={tmp_path.name}'])
    assert not list(tmp_path.glob('*.pth'))


def test_resume_of_what_cannot_be(load_tool, run, checkpoint, tmp_path):
    main = load_tool('train').main
    path = str(run / 'epoch_1.pth')
    for other in (['--load-from', 'x.pth'], ['--leave-out', 'head.']):
        with pytest.raises(ValueError, match=r'epoch_1\.pth takes all of it: --load-from and --leave-out do not go'):
            main(['sknet_digits', '--resume', path, *other])
    with pytest.raises(ValueError, match=rf'^--resume {run}: is a folder; .*--work-dir {run} --resume$'):
        main(['sknet_digits', '--resume', str(run)])


def test_another_packages_config():
    path = find_config('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
    assert path.parts[-5:] == ('mmpretrain', '.mim', 'configs', 'resnet', 'resnet18_8xb16_cifar10.py')
    with pytest.raises(
        FileNotFoundError, match=r"^config 'mmpretrain::resnet/gone\.py': there is no resnet/gone\.py in"
    ):
        find_config('mmpretrain::resnet/gone.py')
    with pytest.raises(FileNotFoundError, match=r"^config 'nowhere::x\.py' is neither a file nor"):
        find_config('nowhere::x.py')


def test_missing_data_root(load_tool, tmp_path):
    options = [f'{split}_dataloader.dataset.data_root=/nowhere' for split in ('train', 'val')]
    options += ['model.backbone.depth=26', f'experiment_name={tmp_path.name}']
    with pytest.raises(ConfigError, match=r"^train_dataloader\.dataset.*: .* '/nowhere/train'; expected: /n"):
        load_tool('train').main(['sknet50_in1k', '--work-dir', str(tmp_path), '--cfg-options', *options])


def test_segmentation(load_tool, tmp_path):
    pytest.importorskip('mmseg')
    name = 'fcn_sknet50-d8_4xb4-80k_ade20k-512x512'
    narrow = ['model.backbone.init_cfg=None', 'model.backbone.depth=26']
    for option, said in (
        ('model.decode_head.num_clases=3', r'model\.decode_head\.num_clases: TypeError: .*near it are num_classes'),
        ('model.backbone.dept=26', r'model\.backbone\.dept: TypeError: SKNet has no argument dept=26'),
        ('train_dataloader.dataset.pipeline.0.type=Lod', r"pipeline\.0\.type='Lod': mmengine knows no transform"),
        ('train_dataloader.dataset.data_root=/nowhere', r"train_dataloader\.dataset: .*'/nowhere/images/training'"),
    ):
        words = [name, '--work-dir', str(tmp_path), '--cfg-options', *narrow, option]
        with pytest.raises(ConfigError, match=said):
            load_tool('train').main([*words, f'experiment_name={tmp_path.name}_{option.partition("=")[0]}'])


def test_one_line_and_the_exit_status(load_tool, monkeypatch, capsys, tmp_path):
    tool = load_tool('train')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', 'sknet_digits', '--cfg-options', 'model.backbone.dept=26'])
    with pytest.raises(SystemExit) as caught:
        tool.run(tool.main)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    *_, error, hint = said.strip().splitlines()
    assert error.startswith('train.py: error: model.backbone.dept: TypeError: SKNet has no argument dept=26')
    assert hint == '(set SK_PLUGINS_TRACEBACK=1 for the traceback)'
    assert 'Traceback' not in said


# Checkpoints that cannot be used


def damage(kind, path, checkpoint, whole):
    if kind == 'truncated':
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('no checkpoint at all')
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'architecture':
        torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}), path)
    elif kind == 'classes':
        torch.save(dict(state_dict=with_classes(checkpoint, 7)), path)


def with_classes(checkpoint, classes):
    return {
        name: torch.full((classes, *tensor.shape[1:]), 0.5) if name.startswith('head.fc.') else tensor
        for name, tensor in checkpoint['state_dict'].items()
    }


SAID = {
    'truncated': r'x\.pth: .*a damaged one: .*failed finding central directory$',
    'empty': r'x\.pth: .*not a file of torch\.save, or a damaged one \(EOFError\)$',
    'text': r'x\.pth: cannot be read as weights: ',
    'list': r'x\.pth: holds no state dict of tensors \(expected',
    'gone': r'x\.pth: no such checkpoint file$|x\.pth: there is no such file$',
    'architecture': r'x\.pth: its weights do not fit this SKNet of depth 26: backbone\.bn1\.weight is missing',
    'classes': r'x\.pth: its weights do not fit the model: size mismatch for head\.fc\.weight.*leave_out',
}


@pytest.fixture
def serve(tmp_path):
    """``serve(path)``: its address on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield lambda path: f'http://127.0.0.1:{server.server_port}/{path.relative_to(tmp_path)}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('kind', SAID)
def test_load_from(start, run, checkpoint, tmp_path, kind):
    path = tmp_path / 'x.pth'
    damage(kind, path, checkpoint, (run / 'epoch_1.pth').read_bytes())
    with pytest.raises((CheckpointError, FileNotFoundError), match=SAID[kind]) as caught:
        start(tmp_path / 'work', arguments=['--load-from', str(path)])
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('work/*.pth'))


@pytest.mark.parametrize('kind', ['truncated', 'text', 'gone', 'architecture'])
def test_other_readers(start, load_tool, run, checkpoint, tmp_path, kind):
    """What resumes, tests, converts, and initialises a backbone."""
    path = tmp_path / 'x.pth'
    damage(kind, path, checkpoint, (run / 'epoch_1.pth').read_bytes())
    before = sorted(tmp_path.iterdir())
    fits = SAID[kind] if kind != 'architecture' else 'x.pth'
    init = ['model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={path}']
    test = ['sknet_digits', str(path), '--work-dir', str(tmp_path / 'test'), '--cfg-options', *NARROW]
    test.append(f'experiment_name={tmp_path.name}')
    for read in (
        lambda: start(tmp_path / 'work', arguments=['--resume', str(path)]),
        lambda: start(tmp_path / 'work', *init),
        lambda: load_tool('test').main(test),
        lambda: load_tool('convert_checkpoint').main([str(path), str(tmp_path / 'out.safetensors')]),
        lambda: load_third_party(path),
    ):
        with pytest.raises((CheckpointError, FileNotFoundError), match=fits) as caught:
            read()
        assert '\n' not in str(caught.value)
    shutil.rmtree(tmp_path / 'work', ignore_errors=True)
    shutil.rmtree(tmp_path / 'test', ignore_errors=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_address(start, serve, run, tmp_path, monkeypatch):
    """Half a file in the cache is downloaded once more; one that is half where it comes from is not kept."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    whole = (run / 'epoch_1.pth').read_bytes()
    served = tmp_path / 'served.pth'
    served.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=r'^http://127.*/served\.pth: not a file of torch\.save, or a damaged'):
        start(tmp_path / 'work', arguments=['--load-from', serve(served)])
    assert [p for p in tmp_path.glob('torch/**/*') if p.is_file()] == []
    with pytest.raises(CheckpointError, match=r'^http://127.*/gone\.pth: cannot be downloaded: HTTP Error 404'):
        load_from_http(serve(tmp_path / 'gone.pth'))

    served.write_bytes(whole)
    load_from_http(serve(served))
    (cached,) = (p for p in tmp_path.glob('torch/**/*') if p.is_file())
    cached.write_bytes(whole[:1000])
    loaded = load_from_http(serve(served))
    assert cached.read_bytes() == whole
    assert torch.equal(loaded['state_dict']['head.fc.bias'], load_checkpoint(run / 'epoch_1.pth')[0]['head.fc.bias'])

    # Another file of this name is another file.
    other = tmp_path / 'other' / 'served.pth'
    other.parent.mkdir()
    torch.save({'head.fc.bias': torch.ones(3)}, other)
    assert load_from_http(serve(other))['state_dict']['head.fc.bias'].shape == (3,)


def test_name_with_a_hash(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    torch.save({'x': torch.ones(3)}, tmp_path / 'net-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'net-0123abcd\.pth: cannot be downloaded: invalid hash value'):
        load_from_http(serve(tmp_path / 'net-0123abcd.pth'))
    assert [p for p in tmp_path.glob('torch/**/*') if p.is_file()] == []


# The head of another number of classes


@pytest.mark.usefixtures('without_training')
@pytest.mark.parametrize('kind', ['mmengine', 'timm'])
def test_leave_out(start, checkpoint, tmp_path, kind):
    path = tmp_path / ('x.pth' if kind == 'mmengine' else 'x.safetensors')
    weights = with_classes(checkpoint, 7)
    if kind == 'mmengine':
        torch.save(dict(state_dict=weights), path)
    else:
        save_state_dict(to_timm(weights), path)
    seen = {}
    loaded = Runner.load_checkpoint

    def look(runner, *args, **kwargs):
        done = loaded(runner, *args, **kwargs)
        seen.update({name: tensor.clone() for name, tensor in runner.model.state_dict().items()})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, 'load_checkpoint', look)
        start(tmp_path / 'work', arguments=['--load-from', str(path), '--leave-out', 'head.'])
    assert seen['head.fc.weight'].shape[0] == 10
    assert not (seen['head.fc.weight'] == 0.5).any()
    assert all(torch.equal(seen[name], weights[name]) for name in seen if name.startswith('backbone.'))


def test_leave_out_of_nothing(start, run, tmp_path):
    arguments = ['--load-from', str(run / 'epoch_1.pth'), '--leave-out', 'haed.']
    with pytest.raises(CheckpointError, match=r"leave_out='haed\.': no tensor .* they begin with backbone\., head\.$"):
        start(tmp_path, arguments=arguments)
    with pytest.raises(ValueError, match=r'^--leave-out head\. goes with --load-from'):
        start(tmp_path, arguments=['--leave-out', 'head.'])


# Pickles that run code


class Evil:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


@pytest.fixture(params=['pickle', 'config'])
def evil(request, checkpoint, tmp_path):
    """A checkpoint that would leave ``marker`` beside it; where it is read by pickle, or as mmengine reads a config."""
    code = f'open({str(tmp_path / "marker")!r}, "w").close()'
    changes = dict(extra=Evil(code)) if request.param == 'pickle' else dict(meta={**checkpoint['meta'], 'config': code})
    path = tmp_path / 'evil.pth'
    torch.save({**checkpoint, **changes}, path)
    if request.param == 'pickle':
        torch.load(path, weights_only=False)
        (tmp_path / 'marker').unlink()  # it is one
    return path


@pytest.mark.usefixtures('without_training')
def test_code_is_not_run(start, load_tool, serve, evil, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    address, number = serve(evil), iter(range(100))
    test = ['sknet_digits', str(evil), '--work-dir', str(tmp_path / 'test'), '--cfg-options', *NARROW]
    test.append('test_dataloader.dataset.indices=8')
    test.append(f'experiment_name={tmp_path.name}')

    def train(*options, arguments=()):
        return lambda: start(tmp_path / f'work_{next(number)}', *options, arguments=arguments)

    def pretrained(part, where):
        return train(f'{part}.init_cfg.type=Pretrained', f'{part}.init_cfg.checkpoint={where}')

    own = tmp_path / 'own'
    own.mkdir()
    shutil.copy(evil, own / 'epoch_1.pth')
    (own / 'last_checkpoint').write_text(str(own / 'epoch_1.pth'))
    reads = {
        'load_from': train(arguments=['--load-from', str(evil)]),
        'load_from of an address': train(arguments=['--load-from', address]),
        'init_cfg': pretrained('model.backbone', evil),
        'init_cfg of an address': pretrained('model.backbone', address),
        "the classifier's init_cfg": pretrained('model', evil),
        'test': lambda: load_tool('test').main(test),
        'convert': lambda: load_tool('convert_checkpoint').main([str(evil), str(tmp_path / 'out.safetensors')]),
        'load_checkpoint': lambda: load_checkpoint(evil),
        'mmengine': lambda: CheckpointLoader.load_checkpoint(str(evil)),
        "another's run": train(arguments=['--resume', str(evil)]),
        'own run': lambda: start(own, arguments=['--resume']),
    }
    outcome = {}
    for name, read in reads.items():
        try:
            read()
            outcome[name] = 'loaded'
        except CheckpointError as error:
            outcome[name] = str(error)
        assert not (tmp_path / 'marker').exists(), name
    refused = {name for name, said in outcome.items() if said != 'loaded'}
    if 'extra' in torch.load(evil, weights_only=False):
        assert refused == {"another's run", 'own run'}
        assert outcome['own run'].endswith(
            'extra is of class builtins.eval, which is not read from a pickle unless '
            'torch.serialization.add_safe_globals names it (in a module of custom_imports)'
        )
    else:
        assert refused == set()


class System:
    def __reduce__(self):
        return os.system, ('true',)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_a_refused_pickle_says_what_it_asks_for(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    torch.save({'x': System()}, path, _use_new_zipfile_serialization=zipped)
    said = rf'^{path}: refused: it asks for {os.system.__module__}\.system, which could run code$'
    with pytest.raises(CheckpointError, match=said):
        load_from_local(str(path))
    torch.save({'state_dict': {'x': torch.ones(1)}, 'y': Evil('1')}, path, _use_new_zipfile_serialization=zipped)
    assert type(load_from_local(str(path))['y']).__name__ == 'builtins.eval'


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_training_state_is_what_was_saved(checkpoint, tmp_path, zipped):
    """All that mmengine saves is read without running any of it."""
    torch.save(checkpoint, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_from_local(str(tmp_path / 'x.pth'))
    assert loaded.keys() == checkpoint.keys()

    def assert_same(a, b, where=''):
        assert type(a) is type(b), where
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                assert_same(a[key], b[key], f'{where}.{key}')
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            for i, (x, y) in enumerate(zip(a, b)):
                assert_same(x, y, f'{where}.{i}')
        elif type(a).__name__ == 'HistoryBuffer':
            assert [d.tolist() for d in a.data] == [d.tolist() for d in b.data]
            assert a.mean() == b.mean() == a.statistics('mean')
        else:
            assert a == b, where

    assert_same(loaded, checkpoint)
    assert loaded['message_hub']['log_scalars']


# A disk that is full


@pytest.fixture(params=['tmpfs', 'limit'])
def full(request, tmp_path):
    """``full(size)``: a folder and a context in which it takes no more than ``size`` bytes, with how this is said.

    A small file system needs the right to mount one; a limit to the size of a file does not.
    """
    folder = tmp_path / 'full'
    folder.mkdir()

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def make(size):
        if request.param == 'limit':
            return folder, limited(size * 2 // 3), 'File too large'
        words = ['mount', '-t', 'tmpfs', '-o', f'size={size * 3 // 2}', 'tmpfs', str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip('there is no mount here')
        if done.returncode:
            pytest.skip(f'a tmpfs cannot be mounted here: {done.stderr.strip()}')
        return folder, contextlib.nullcontext(), 'No space left on device'

    yield make
    if folder.is_mount():
        subprocess.run(['umount', '--lazy', str(folder)], check=True)  # the log is open still


def test_full_disk_in_training(start, run, full, load_tool, capsys):
    """The second epoch's checkpoint finds no room: the first one's is whole, and it is what a run goes on from."""
    first = (run / 'epoch_1.pth').read_bytes()
    folder, context, said = full(len(first))
    (folder / 'epoch_1.pth').write_bytes(first)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
    keep = ['default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=-1']

    def go_on():
        start(folder, 'train_cfg.max_epochs=2', arguments=['--resume'], files=keep)

    with context, pytest.raises(SystemExit) as caught:
        load_tool('train').run(go_on)
    assert caught.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-2]
    assert re.search(rf'error: .*epoch_2\.pth: cannot be written: {said}', error)
    assert (folder / 'epoch_1.pth').read_bytes() == first
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'epoch_1.pth')
    assert [path.name for path in folder.glob('*') if path.is_file() and 'epoch_2' in path.name] == []
    assert list(folder.glob('.*.part')) == []


@pytest.mark.parametrize('name', ['out.safetensors', 'out.pth', 'out'])
def test_full_disk_in_converting(run, full, load_tool, name):
    state_dict = to_timm(load_checkpoint(run / 'epoch_1.pth')[0])
    size = 4 * sum(tensor.numel() for tensor in state_dict.values())
    folder, context, said = full(size // 3)
    words = [str(run / 'epoch_1.pth'), str(folder / name)]
    if name == 'out':
        words += ['--config', str(folder / 'narrow.py')]
        base = f'_base_ = [{str(find_config("sknet_digits"))!r}]\n'
        (folder / 'narrow.py').write_text(base + 'model = dict(backbone=dict(layers=(1, 1, 1, 1)))\n')
    else:
        (folder / name).write_bytes(b'something good')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with context, pytest.raises(OSError, match=rf'{name}: cannot be written: .*{said}'):
        load_tool('convert_checkpoint').main(words)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
