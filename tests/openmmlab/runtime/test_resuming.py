"""Runs that stop anywhere and go on, against runs that don't, in one process: bit for bit. And files that are whole."""

import errno
import itertools
import os
import pickle
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine')

import torch
import torch.nn.functional as F
from helpers.resumed_runs import assert_equal, end_of, files_of
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, Dataset

from sk_plugins._files import write_atomically
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.openmmlab.runtime.resuming import (
    ResumableBatches,
    SeededBatch,
    find_resumable,
    make_resumable,
)
from sk_plugins.weights import CheckpointError

IMAGES, BATCH, EPOCHS = 26, 4, 4
STEPS = 7  # an epoch's: the last batch has two images


class StoppedError(Exception):
    pass


class Images(Dataset):
    """Ten numbers and a target each; noise of all three kinds is the augmentation."""

    def __init__(self, augment):
        numbers = torch.Generator().manual_seed(0)
        self.images, self.targets = (torch.randn(IMAGES, n, generator=numbers) for n in (10, 1))
        self.augment = augment
        self.read = []

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        self.read.append(int(index))
        image = self.images[index]
        if self.augment:
            image = image * random.uniform(0.5, 1.5) + np.random.randn() + torch.rand(10)
        return image, self.targets[index]


class Network(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, images, targets, mode='loss'):
        output = self.layers(torch.stack(images))
        return {'loss': F.mse_loss(output, torch.stack(targets))} if mode == 'loss' else list(output)


class Error(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(x) for x in data_samples]

    def compute_metrics(self, results):
        random.random(), np.random.rand(), torch.rand(1)  # what validation draws is nothing to training
        return {'acc': -sum(results)}


class StopHook(Hook):
    """Stops the run ``where`` hooks are called for the ``number``-th time."""

    priority = 'VERY_HIGH'

    def __init__(self, where, number):
        self.left = number
        setattr(self, where, self.count)

    def count(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise StoppedError


def make(work_dir, workers=0, hook=None, stop=None, iterations=None, infinite=True, epochs=EPOCHS, **cfg):
    """A runner with all that has a state: momentum, averages, schedules, accumulated gradients, the best score."""
    torch.manual_seed(0)
    loader = {'batch_size': BATCH, 'num_workers': workers, 'persistent_workers': workers > 0}
    loader['collate_fn'] = pseudo_collate
    train, val = (Images(augment) for augment in (True, False))
    sampler = InfiniteSampler if iterations and infinite else DefaultSampler
    hooks = [dict(type='EMAHook', momentum=0.1)]
    if stop is not None:
        hooks.append(StopHook(*stop))
    hook = {'interval': 1, 'save_best': 'acc', 'max_keep_ckpts': 2, 'by_epoch': not iterations, **(hook or {})}
    default = dict(checkpoint=dict(type='CheckpointHook', **hook))
    cfg = dict(randomness=dict(seed=3), **cfg)
    return Runner(
        model=Network(),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=train, sampler=dict(type=sampler, shuffle=True), **loader),
        val_dataloader=dict(dataset=val, sampler=dict(type=DefaultSampler, shuffle=False), batch_size=BATCH),
        val_evaluator=[Error()],
        train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=6)
        if iterations
        else dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9), accumulative_counts=2),
        param_scheduler=[dict(type='CosineAnnealingLR', by_epoch=False, T_max=30)],
        default_hooks=make_resumable(Config(dict(default_hooks=default))).default_hooks,
        custom_hooks=hooks,
        experiment_name=f'resuming_{next(NUMBER)}',
        default_scope='mmengine',
        log_level='WARNING',
        **cfg,
    )


NUMBER = iter(range(10**6))


def stop(work_dir, where, number, **options):
    with pytest.raises(StoppedError):
        train(make(work_dir, stop=(where, number), **options))


def train(runner):
    try:
        runner.train()
    finally:  # or the workers go with the garbage, five seconds for each
        iterator = getattr(runner.train_loop, 'dataloader_iterator', runner.train_dataloader)._iterator
        if iterator is not None and hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()


EPOCH = dict()
EPOCH_BY_ITERATIONS = dict(hook=dict(interval=3, by_epoch=False))
ITERATIONS = dict(iterations=28)
PASSES = dict(iterations=28, infinite=False, hook=dict(interval=5))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """``whole(**options)``: the work dir of a run that nothing stopped."""
    runs = {}

    def run(**options):
        key = repr(options)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp('whole')
            make(runs[key], **options).train()
        return runs[key]

    return run


# Where hooks are called, and for which time since the run went on: before the first checkpoint, in a step, in
# validation, after a step, between two checkpoints of one moment, and when the metrics are known but not yet saved.
STOPS = [
    ('before_train_iter', 2),
    ('before_train_iter', 9),
    ('before_val_iter', 3),
    ('after_train_iter', 8),
    ('before_save_checkpoint', 2),
    ('after_val_epoch', 1),
]


@pytest.mark.parametrize('options', [EPOCH, EPOCH_BY_ITERATIONS, ITERATIONS, PASSES], ids=str)
def test_stopped_and_resumed(whole, tmp_path, options):
    for where, number in STOPS:
        stop(tmp_path, where, number, resume=True, **options)
    make(tmp_path, resume=True, **options).train()
    expected = whole(**options)
    assert_equal(end_of(tmp_path), end_of(expected))
    assert files_of(tmp_path) == files_of(expected)


@pytest.mark.parametrize('options', [EPOCH_BY_ITERATIONS, PASSES], ids=str)
def test_workers(whole, tmp_path, options):
    """Neither their number nor how far they had read ahead is of consequence."""
    stop(tmp_path, 'before_train_iter', 12, workers=2, **options)
    train(make(tmp_path, resume=True, workers=1, **options))
    assert_equal(end_of(tmp_path), end_of(whole(**options)))


def test_the_middle_of_an_epoch_is_found_without_reading(tmp_path):
    options = dict(hook=dict(interval=3, by_epoch=False))
    stop(tmp_path, 'before_train_iter', STEPS + 5, **options)  # with a checkpoint after 9: two of the second epoch
    runner = make(tmp_path, resume=True, stop=('after_train_epoch', 1), **options)
    seen = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append((runner.epoch, runner.iter, batch_idx))

    runner.register_hook(Look())
    with pytest.raises(StoppedError):
        runner.train()
    assert seen == [(1, 9 + n, 2 + n) for n in range(STEPS - 2)]
    sampler = DefaultSampler(range(IMAGES), seed=3)
    sampler.set_epoch(1)
    assert runner.train_dataloader.dataset.read == list(sampler)[2 * BATCH :]


def test_mmengine_alone_falls_short(tmp_path):
    """What the hook is for: with mmengine's own, the same stop gives other weights."""
    ends = []
    for stops in ([], [12]):
        work_dir = tmp_path / str(len(stops))
        for number in stops:
            runner = make(work_dir, stop=('before_train_iter', number))
            _without(runner)
            with pytest.raises(StoppedError):
                runner.train()
        runner = make(work_dir, resume=True)
        _without(runner)
        runner.train()
        ends.append(torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=False)['state_dict'])
    assert not all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def _without(runner):
    runner._hooks = [h for h in runner._hooks if not isinstance(h, CheckpointHook)]
    runner.register_hook(CheckpointHook(interval=1, save_best='acc', max_keep_ckpts=2))


def test_an_unset_seed_is_the_checkpoints(tmp_path):
    """Which mmengine restores after it has made the sampler."""
    options = dict(hook=dict(interval=1), randomness=dict())
    seeds = []
    stopped = make(tmp_path, stop=('before_train_iter', 12), **_unseeded(options))
    with pytest.raises(StoppedError):
        stopped.train()
    resumed = make(tmp_path, resume=True, **_unseeded(options))
    resumed.train()
    for runner in (stopped, resumed):
        batches = runner.train_dataloader.batch_sampler
        seeds.append((runner.seed, batches.sampler.seed, batches.seed))
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 1


def _unseeded(options):
    return {k: v for k, v in options.items() if k != 'randomness'}


def test_early_stopping_keeps_its_count(tmp_path):
    early = dict(type='EarlyStoppingHook', monitor='acc', rule='greater', patience=2, min_delta=1e6)

    def run(stop=None):
        runner = make(tmp_path, resume=True, stop=stop)
        runner.register_hook(early)
        runner.train()
        return runner

    with pytest.raises(StoppedError):
        run(('before_train_iter', 2 * STEPS + 2))
    runner = run()
    assert runner.epoch == 3  # the first is the best, two more bring nothing
    assert run().iter == 3 * STEPS  # and there it stays


# What random numbers depend on


def test_a_samples_numbers_are_its_places():
    def draw(batches):
        out = {}
        for batch, places in batches:
            for index in SeededBatch(batch, (3, 1, 0), places):
                out[index] = (random.random(), np.random.rand(), float(torch.rand(1)))
        return out

    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    one = draw([([5, 7, 9, 2], range(4))])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    assert one == draw([([9, 2], range(2, 4)), ([5, 7], range(2))])
    numbers = [number for drawn in one.values() for number in drawn]
    assert len(set(numbers)) == len(numbers) == 12
    batch = SeededBatch([5, 7], (3, 1, 0), range(2))
    copy = pickle.loads(pickle.dumps(batch))
    assert (type(copy), list(copy), copy.key, copy.places) == (SeededBatch, [5, 7], (3, 1, 0), range(2))
    assert torch.equal(torch.get_rng_state(), state[0])


def test_two_processes_places_are_those_of_one(monkeypatch):
    sampler = DefaultSampler(range(10), shuffle=False)
    (one,) = ResumableBatches(BatchSampler(sampler, 10, False), seed=0)
    assert one.places == range(10)
    for rank in range(2):
        monkeypatch.setattr('sk_plugins.openmmlab.runtime.resuming.get_dist_info', lambda rank=rank: (rank, 2))
        batches = list(ResumableBatches(BatchSampler(list(range(rank, 10, 2)), 3, False), seed=0))
        assert [list(batch.places) for batch in batches] == [list(batch) for batch in batches]


def test_endless_batches_skip_into_a_later_epoch():
    def batches(skip):
        sampler = DefaultSampler(range(10), seed=1)
        batches = ResumableBatches(BatchSampler(sampler, 4, False), seed=0, endless=True)
        batches.skip = skip
        return itertools.islice(((list(b), b.key, b.places) for b in batches), 9 - skip)

    whole = list(batches(0))
    assert [key[-1] for _, key, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert list(batches(4)) == whole[4:]


# Files


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')
    link = tmp_path / 'link.pth'
    link.symlink_to(path)

    def write(path, data):
        with write_atomically(path) as partial:
            partial.write_bytes(data)

    write(link, b'new')
    assert link.is_symlink()
    assert path.read_bytes() == b'new'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'a\.pth: cannot be written: File too large') as caught:
            write(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b'new'

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, b'third')
    assert path.read_bytes() == b'new'
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'link.pth']


@pytest.fixture(scope='module')
def saved(whole):
    """A work dir with two checkpoints, and the best."""
    work_dir = whole()
    names = files_of(work_dir)
    assert [n for n in names if not n.startswith('best')] == ['epoch_3.pth', 'epoch_4.pth', 'last_checkpoint']
    return work_dir


@pytest.fixture
def copy(saved, tmp_path):
    """Of that, with ``last_checkpoint`` of the old place: it was moved."""
    return Path(shutil.copytree(saved, tmp_path / 'copy'))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (truncate, 'it is cut off'),
        (lambda path: path.write_bytes(b''), 'it has no content'),
        (lambda path: path.write_bytes(b'no checkpoint'), 'cannot be read: '),
        (flip, 'damaged'),
    ],
    ids=['truncated', 'empty', 'text', 'flipped'],
)
def test_a_damaged_checkpoint_is_passed_over(copy, damage, said):
    damage(copy / 'epoch_4.pth')
    found, (line,) = find_resumable(copy)
    assert found == str(copy / 'epoch_3.pth')
    assert line.startswith(f'{copy}/epoch_4.pth cannot be read: ')
    assert said in line
    assert '\n' not in line


@pytest.mark.parametrize(
    ('content', 'said'),
    [(b'', 'is empty'), (b'\0\0', 'is empty'), (b'/gone/epoch_9.pth', 'names /gone/epoch_9.pth, which is not there')],
)
def test_a_stale_last_checkpoint_is_passed_over(copy, content, said):
    (copy / 'last_checkpoint').write_bytes(content)
    assert find_resumable(copy) == (str(copy / 'epoch_4.pth'), [f'{copy}/last_checkpoint {said}'])


def test_last_checkpoint_is_looked_for_where_it_is(copy, tmp_path):
    assert find_resumable(copy) == (str(copy / 'epoch_4.pth'), [])
    (copy / 'last_checkpoint').write_text('epoch_3.pth')
    assert find_resumable(copy) == (str(copy / 'epoch_3.pth'), [])
    (copy / 'last_checkpoint').write_text('s3://bucket/epoch_3.pth')
    assert find_resumable(copy) == ('s3://bucket/epoch_3.pth', [])
    (copy / 'last_checkpoint').unlink()
    assert find_resumable(copy) == (str(copy / 'epoch_4.pth'), [])
    (tmp_path / 'other').mkdir()
    assert find_resumable(tmp_path / 'other', copy) == (str(copy / 'epoch_4.pth'), [])
    assert find_resumable(tmp_path / 'other') == find_resumable(tmp_path / 'none') == (None, [])
    for path in copy.glob('epoch_*'):
        path.unlink()
    assert find_resumable(copy) == (None, [])  # the best one has weights alone


def test_another_runs_checkpoint_is_the_last_resort(saved, copy):
    """Of a copy whose ``last_checkpoint`` names the run that it was copied from."""
    named = (copy / 'last_checkpoint').read_text()
    assert Path(named).parent == saved
    (copy / 'epoch_4.pth').unlink()
    line = f'{copy}/last_checkpoint names {named}, which is in none of the folders of this run'
    assert find_resumable(copy) == (str(copy / 'epoch_3.pth'), [line])
    (copy / 'epoch_3.pth').unlink()
    assert find_resumable(copy) == (named, [line])


def test_nothing_but_damaged_checkpoints(copy):
    for path in copy.glob('epoch_*.pth'):
        truncate(path)
    runner = make(copy, resume=True)
    with pytest.raises(CheckpointError, match=r'no checkpoint there can be gone on from: .*epoch_4.*epoch_3.*remove'):
        train(runner)
    assert runner.iter == 0


class System:
    def __reduce__(self):
        return os.system, ('true',)


def test_a_refused_checkpoint_is_not_called_damaged(copy):
    checkpoint = torch.load(copy / 'epoch_4.pth', weights_only=False)
    torch.save({**checkpoint, 'extra': System()}, copy / 'epoch_4.pth')
    found, (line,) = find_resumable(copy)
    assert found == str(copy / 'epoch_3.pth')
    module = os.system.__module__
    assert line == f'{copy}/epoch_4.pth cannot be read: refused: it asks for {module}.system, which could run code'


@pytest.mark.parametrize('kind', ['before torch 1.6', 'without checksums'])
def test_other_formats_of_torch(copy, whole, kind):
    path = copy / 'epoch_3.pth'
    (copy / 'epoch_4.pth').unlink()
    (copy / 'last_checkpoint').write_text(path.name)
    checkpoint = torch.load(path, weights_only=False)
    if kind == 'before torch 1.6':
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(checkpoint, path)
        finally:
            torch.serialization.set_crc32_options(True)
    assert find_resumable(copy) == (str(path), [])
    train(make(copy, resume=True))
    assert_equal(end_of(copy), end_of(whole()))


def test_the_best_by_a_metric_that_there_is_not(tmp_path):
    said = r'^default_hooks\.checkpoint\.save_best=top1_acc: validation gives no such metric, but acc$'
    with pytest.raises(ConfigError, match=said):
        train(make(tmp_path, hook=dict(save_best='top1_acc', rule='greater')))
    assert find_resumable(tmp_path) == (str(tmp_path / 'epoch_1.pth'), [])


def test_resuming_with_bad_files_there(copy, whole, caplog):
    """From the one before; the rest of a write goes; the damaged file is written again; what is bad is said."""
    truncate(copy / 'epoch_4.pth')
    (copy / '.epoch_5.pth.x.part').mkdir()
    (copy / '.epoch_5.pth.x.part' / 'epoch_5.pth').write_bytes(b'half')
    runner = make(copy, resume=True)
    lines = []
    runner.logger.warning = lines.append
    train(runner)
    assert [line for line in lines if 'passed over' in line] == [
        f'Resuming: {copy}/epoch_4.pth cannot be read: it is cut off; passed over'
    ]
    assert f'Resuming: from {copy}/epoch_3.pth' in lines
    assert_equal(end_of(copy), end_of(whole()))
    assert files_of(copy) == files_of(whole())


def test_where_nothing_is_saved_yet(tmp_path):
    weights = tmp_path / 'weights.pth'
    torch.save({'state_dict': Network().state_dict()}, weights)
    seen = []

    class Look(Hook):
        def before_train(self, runner):
            seen.append((runner.iter, {k: v.clone() for k, v in runner.model.state_dict().items()}))

    runner = make(tmp_path / 'run', resume=True, hook=dict(start_from=str(weights)), stop=('before_train_iter', 1))
    runner.register_hook(Look(), 'VERY_HIGH')
    with pytest.raises(StoppedError):
        train(runner)
    ((iteration, state_dict),) = seen
    assert iteration == 0
    assert_equal(state_dict, dict(torch.load(weights)['state_dict']))


@pytest.mark.parametrize('write', [2, 3, 4, 5, 6])
def test_a_full_disk_leaves_what_is_there(tmp_path, monkeypatch, write):
    """At any write after the first: a checkpoint's, the best one's, last_checkpoint's."""
    replace, left = os.replace, [write]

    def full(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)
        replace(source, target)

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='cannot be written: No space left on device'):
        make(tmp_path, hook=dict(max_keep_ckpts=1)).train()
    monkeypatch.undo()
    found, passed_over = find_resumable(tmp_path)
    assert found is not None
    assert passed_over == []
    assert not list(tmp_path.glob('.*'))
    for path in tmp_path.glob('*.pth'):
        torch.load(path, weights_only=False)


def test_another_runs_files_stay(saved, tmp_path):
    """A run that goes on from another's checkpoint removes nothing there, nor files of the same names here."""
    before = {p.name: p.stat().st_mtime_ns for p in saved.iterdir()}
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    (work_dir / 'epoch_3.pth').write_bytes(b'of somebody else')
    runner = make(work_dir, resume=True, load_from=str(saved / 'epoch_4.pth'), hook=dict(max_keep_ckpts=1), epochs=6)
    train(runner)
    assert {p.name: p.stat().st_mtime_ns for p in saved.iterdir()} == before
    assert (work_dir / 'epoch_3.pth').read_bytes() == b'of somebody else'
    assert not (work_dir / 'epoch_5.pth').exists()
    assert Path((work_dir / 'last_checkpoint').read_text()) == work_dir / 'epoch_6.pth'


def test_make_resumable():
    def hook(**default_hooks):
        return make_resumable(Config(default_hooks), 'a.pth').get('default_hooks', {}).get('checkpoint')

    resumable = dict(type='ResumableCheckpointHook', interval=1, start_from='a.pth')
    assert hook() == resumable
    assert hook(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1))) == resumable
    assert hook(default_hooks=dict(checkpoint=dict(type='Own', interval=1))) == dict(type='Own', interval=1)
    assert hook(default_hooks=dict(checkpoint=None)) is None
