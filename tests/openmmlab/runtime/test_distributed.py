"""Several processes over gloo: synchronised norms, equal losses, lost processes, restarts, other numbers of them.

What starts torchrun on the digits is marked slow: make test-reliability.
"""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers import sync_batchnorm_cases as cases
from torch import nn

import sk_plugins
from sk_plugins._resources import ROOT
from sk_plugins.openmmlab.runtime import distributed
from sk_plugins.openmmlab.runtime.sync_batchnorm import SyncBatchNorm, synchronise
from sk_plugins.weights import load_checkpoint

TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='gloo is for CPUs')


@pytest.fixture(scope='session')
def environment():
    """Of a process that finds the package and the helpers of the tests, and takes one thread."""
    env = {k: v for k, v in os.environ.items() if k not in ('LOCAL_RANK', 'RANK', 'SK_PLUGINS_TRACEBACK')}
    paths = [str(Path(sk_plugins.__file__).parents[1]), str(TESTS), env.get('PYTHONPATH', '')]
    return {
        **env,
        'PYTHONPATH': os.pathsep.join(paths),
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{env.get("PATH", "")}',
        'OMP_NUM_THREADS': '1',
        'PYTHONWARNINGS': 'ignore',
    }


@pytest.fixture(scope='session')
def free_port():
    """``free_port()``: a port for torchrun."""

    def find():
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            return str(probe.getsockname()[1])

    return find


# The norm


@pytest.fixture(scope='module')
def shares(environment, tmp_path_factory):
    """``shares[rank][case]``: what each of two processes got."""
    folder = tmp_path_factory.mktemp('shares')
    words = [sys.executable, TESTS / 'helpers' / 'sync_batchnorm_cases.py', folder, '2']
    subprocess.run(words, env=environment, check=True, timeout=120)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


# As a part of the largest value; of the low precisions, what they can hold.
TOLERANCE = {'float64': 1e-9, 'float32': 2e-6, 'bfloat16': 1e-2}


@pytest.mark.parametrize('name', [name for name in cases.CASES if name != 'one value'])
def test_shares_are_the_whole_batch(shares, name):
    module, steps = cases.make(name)
    # In double precision, on the values that the shares hold.
    whole = cases.run(name, module.double(), [(x.double(), grad.double()) for x, grad in steps])
    ranks = [results[name] for results in shares]
    assert {*whole} == {*ranks[0]} == {*ranks[1]}
    case = cases.settings(name)
    alone = not case['training'] and case['kwargs'].get('track_running_stats') is False
    for key, expected in whole.items():
        parts = [rank[key] for rank in ranks]
        tolerance = TOLERANCE[case['dtype']]
        if key.startswith(('output', 'gradient of input')):
            got = torch.cat(parts)
            assert got.dtype == getattr(torch, case['dtype'])
        elif key.startswith('gradient'):
            got = sum(part.double() for part in parts)
        else:
            assert torch.equal(*parts), key
            got = parts[0]
        if case['mean']:
            tolerance *= case['mean']  # that many values' worth of digits are the mean's
        if alone and not key.startswith('gradient of bias'):  # by its own images, as torch's does
            assert not torch.allclose(got.double(), expected, atol=1e-2), key
            continue
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < tolerance, (key, float(error))


def test_one_value_is_refused_in_every_process(shares):
    said = 'SyncBatchNorm: in training, 1 values per channel in all processes are too few'
    assert [results['one value'] for results in shares] == [said, said]


def test_unsynchronised_shares_are_not_the_whole_batch():
    """So that the comparison above says something."""
    module, steps = cases.make('uneven')
    whole = cases.run('uneven', module, steps)
    module, steps = cases.make('uneven')
    first = cases.run('uneven', module, [(x[:5], grad[:5]) for x, grad in steps])
    assert (first['output 0'] - whole['output 0'][:5]).abs().max() > 0.1
    assert (first['running_mean'] - whole['running_mean']).abs().max() > 0.1


def test_channels_last_stays(shares):
    for results in shares:
        assert results['channels last']['output 0'].is_contiguous(memory_format=torch.channels_last)
        assert results['channels last']['gradient of input 0'].is_contiguous(memory_format=torch.channels_last)


def test_alone_it_is_batch_norm():
    reference, steps = cases.make('uneven')
    norm = SyncBatchNorm(6).double()
    norm.load_state_dict(reference.state_dict(), strict=True)
    expected, got = cases.run('uneven', reference, steps), cases.run('uneven', norm, steps)
    assert [*got] == [*expected]
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match=r'takes \(B, C, \.\.\.\), got an input of the shape \(6,\)'):
        norm(torch.zeros(6))


def test_synchronise():
    """torch's, and those alone, are replaced; the tensors stay, and who holds them."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.SyncBatchNorm(4, 1e-3, None).eval(), nn.ReLU()))
    model[1][0].weight.requires_grad_(False)
    before = dict(model.state_dict(keep_vars=True))
    assert synchronise(model) is model
    after = dict(model.state_dict(keep_vars=True))
    assert [*before] == [*after]
    assert all(before[key] is after[key] for key in before)
    norm = model[1][0]
    assert (type(model[0]), type(norm)) == (nn.BatchNorm2d, SyncBatchNorm)
    assert (norm.eps, norm.momentum, norm.training, norm.process_group) == (1e-3, None, False, None)
    assert type(synchronise(nn.SyncBatchNorm(2))) is SyncBatchNorm


# One line for what went wrong

LOST = '[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:7396.\nThis is typically ...'


@pytest.mark.parametrize(
    ('error', 'lost'),
    [
        (RuntimeError(LOST), True),
        (torch.distributed.DistNetworkError('timed out'), True),
        (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
        (ValueError(LOST), False),
    ],
    ids=str,
)
def test_is_lost_peer(error, lost):
    assert distributed.is_lost_peer(error) is lost


@pytest.fixture
def run_tool(load_common, monkeypatch, capsys):
    """``run_tool(error, **environment)``: what a tool prints that raises, and how long it gave torchrun before."""
    naps = []
    monkeypatch.setattr(distributed.time, 'sleep', naps.append)

    def run(error, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, 'argv', ['tools/train.py'])

        def main():
            raise error

        with pytest.raises(SystemExit) as caught:
            load_common.run(main)
        assert caught.value.code == 1
        return capsys.readouterr().err, naps

    return run


@pytest.fixture(scope='module')
def load_common():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools')
        patch.delitem(sys.modules, '_common', raising=False)
        yield importlib.import_module('_common')


def test_who_lost_another_lets_torchrun_speak(run_tool):
    said = f'train.py: error: process 3 cannot reach the others: {" ".join(LOST.split())}\n'
    assert run_tool(RuntimeError(LOST), RANK='3') == (said, [])
    assert run_tool(RuntimeError(LOST), RANK='3', TORCHELASTIC_RUN_ID='none') == (said, [20])


def test_what_all_have_to_say_the_first_says(run_tool):
    error, naps = run_tool(ValueError('no such data'), RANK='0', TORCHELASTIC_RUN_ID='none')
    assert (error.splitlines()[0], naps) == ('train.py: error: no such data', [])
    assert run_tool(ValueError('no such data'), RANK='1') == (error, [5])


def test_other_errors_keep_their_traceback(load_common):
    def main():
        raise RuntimeError('shapes')

    with pytest.raises(RuntimeError, match=r'^shapes$'):
        load_common.run(main)


@pytest.mark.parametrize(
    ('how', 'said'),
    [
        ('os.kill(os.getpid(), 9)', 'was killed by signal 9 (SIGKILL)'),
        pytest.param('sys.exit(3)', 'ended with status 3, for the reason that it gave above', marks=pytest.mark.slow),
    ],
)
def test_the_launcher_names_the_process(environment, tmp_path, free_port, how, said):
    script = tmp_path / 'script.py'
    script.write_text(f"""
import os, sys, time
if os.environ['RANK'] == '1':
    print(os.getpid(), flush=True)
    {how}
time.sleep(60)
""")
    words = [sys.executable, ROOT / 'tools/_launch.py', '--nproc-per-node=3', f'--master-port={free_port()}', script]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    pid = done.stdout.strip()
    assert done.stderr == f'script.py: error: process 1 (pid {pid}) {said}; the other processes were stopped\n'


@pytest.mark.slow
def test_the_launcher_names_a_port_in_use(environment, tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, ROOT / 'tools/_launch.py', f'--master-port={port}', tmp_path / 'script.py']
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f'script.py: error: --master-addr=127.0.0.1 --master-port={port}: The server socket has f' in done.stderr
    assert 'Traceback' not in done.stderr


# Another number of images a step


@pytest.fixture
def runner():
    """What the hook asks of a runner: iteration, loader, log."""
    logged = []
    loader = SimpleNamespace(batch_size=8)
    return SimpleNamespace(
        iter=20,
        train_dataloader=loader,
        auto_scale_lr=None,
        optim_wrapper=SimpleNamespace(defaults=dict(lr=0.1)),
        logger=SimpleNamespace(warning=logged.append),
        logged=logged,
    )


@pytest.mark.parametrize(
    ('saved', 'processes', 'size', 'advice'),
    [
        ((4, 8), 4, 8, None),
        ((4, 8), 2, 16, None),
        ((4, 8), 1, 32, None),
        ((4, 8), 2, 8, '2 of 8, 16 a step: its learning rate was for 32, and what counts iterations goes on from 20. '
         'For 32 a step again: train_dataloader.batch_size=16.'),
        ((4, 8), 3, 8, '3 of 8, 24 a step: its learning rate was for 32, and what counts iterations goes on from 20. '
         'For 32 a step again: another number of processes, which divides it.'),
    ],
)  # fmt: skip
def test_another_number_of_images_a_step(runner, monkeypatch, saved, processes, size, advice):
    hook, checkpoint = distributed.TotalBatchHook(), dict(meta={})
    monkeypatch.setattr(distributed, 'get_world_size', lambda: saved[0])
    runner.train_dataloader.batch_size = saved[1]
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint['meta'] == dict(batch=dict(processes=saved[0], size=saved[1]))
    monkeypatch.setattr(distributed, 'get_world_size', lambda: processes)
    runner.train_dataloader.batch_size = size
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    prefix = 'The checkpoint is of 4 processes with 8 images each, 32 a step, and goes on with '
    assert runner.logged == ([] if advice is None else [prefix + advice])


def test_weights_alone_and_older_checkpoints_are_of_no_batch(runner):
    hook = distributed.TotalBatchHook()
    hook.after_load_checkpoint(runner, dict(meta=dict(epoch=1)))
    hook.before_train(runner)
    hook.after_load_checkpoint(runner, dict(meta=dict(batch=dict(processes=2, size=1))))
    runner.iter = 0
    hook.before_train(runner)
    assert runner.logged == []


@pytest.mark.parametrize(
    ('base', 'size', 'rate'),
    [(256, 32, '0.0125'), (256, 512, '0.2'), (32, 32, None), (36, 32, None), (None, 32, None)],
)
def test_a_rate_for_another_number_of_images_a_step(runner, base, size, rate):
    runner.iter, runner.train_dataloader.batch_size = 0, size
    runner.auto_scale_lr = dict(base_batch_size=base)
    distributed.TotalBatchHook().before_train(runner)
    assert runner.logged == (
        []
        if rate is None
        else [
            f'The learning rate, 0.1, is for {base} images a step, and this run takes {size}: '
            f'auto_scale_lr.enable=True (--auto-scale-lr) makes it {rate}, '
            f'auto_scale_lr.base_batch_size={size} says that it is meant.'
        ]
    )
    runner.logged.clear()
    runner.auto_scale_lr['enable'] = True
    distributed.TotalBatchHook().before_train(runner)
    assert runner.logged == []


def test_a_batch_sampler_has_the_size(runner):
    runner.train_dataloader = SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=2))
    checkpoint = dict(meta={})
    distributed.TotalBatchHook().before_save_checkpoint(runner, checkpoint)
    assert checkpoint['meta']['batch'] == dict(processes=1, size=2)


# Runs on the digits

CONFIG = f"""
_base_ = [{str(ROOT / 'configs/sknet_digits.py')!r}]
imports = ['sk_plugins.mmpretrain_models', 'helpers.process_losses', 'helpers.double_precision']
custom_imports = dict(imports=imports, allow_failed_imports=False)
custom_hooks = [dict(type='ProcessLossHook'), dict(type='DoublePrecisionHook')]
model = dict(backbone=dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 16), cardinality=4), head=dict(in_channels=64))
train_dataloader = dict(dataset=dict(indices=320))
val_dataloader = dict(batch_size=10, dataset=dict(indices=40))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=10, save_best=None))
"""
TOTAL, STEPS, EPOCHS = 32, 10, 5  # images a step, steps an epoch


@pytest.fixture
def launch(environment, free_port, tmp_path):
    """``launch(work_dir, processes, *words, epochs=EPOCHS, options=(), script=True, **variables)``: started."""
    started = []
    config = tmp_path / 'small_digits.py'
    config.write_text(CONFIG)

    def start(work_dir, processes, *words, epochs=EPOCHS, options=(), script=True, **variables):
        options = [f'train_cfg.max_epochs={epochs}', 'sync_bn=torch', *options]
        if not any(option.startswith('train_dataloader.batch_size') for option in options):
            options.append(f'train_dataloader.batch_size={TOTAL // processes}')
        words = [*words, '--work-dir', tmp_path / work_dir, '--cfg-options', *options]
        if script:
            words = ['bash', ROOT / 'tools/dist_train.sh', config, processes, *words]
        else:
            torchrun = ['torchrun', f'--nproc-per-node={processes}', f'--master-port={free_port()}', '--max-restarts=2']
            words = [*torchrun, ROOT / 'tools/train.py', config, '--launcher', 'pytorch', *words]
        env = {**environment, 'CUDA_VISIBLE_DEVICES': '', 'PORT': free_port(), **variables}
        log = (tmp_path / f'{len(started)}.log').open('w+')
        process = subprocess.Popen(
            [str(word) for word in words], env=env, stdout=log, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its own
            process.communicate()


def finish(process, status=0):
    """A run's errors, when it is done."""
    _, errors = process.communicate(timeout=500)
    assert process.returncode == status, errors[-3000:]
    return errors


def losses_of(work_dir, processes):
    """Of every step, the mean over the processes; a step that was run twice, the last time."""
    ranks = []
    for rank in range(processes):
        lines = (work_dir / f'losses_{rank}').read_text().splitlines()
        ranks.append({int(step): float(loss) for step, loss in map(str.split, lines)})
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    return {step: sum(rank[step] for rank in ranks) / processes for step in ranks[0]}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def workers_of(process):
    """The processes that torchrun started, by rank."""
    (agent,) = (pid for pid in descendants(process.pid) if b'--nproc-per-node' in command_line(pid) and children(pid))
    return {int(environment_of(pid)['RANK']): pid for pid in children(agent)}


def children(pid):
    return [int(word) for word in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def descendants(pid):
    return [pid, *(further for child in children(pid) for further in descendants(child))]


def command_line(pid):
    return Path(f'/proc/{pid}/cmdline').read_bytes()


def environment_of(pid):
    return dict(line.split('=', 1) for line in Path(f'/proc/{pid}/environ').read_text().split('\0') if '=' in line)


def wait_for(path, process, seconds=300):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_losses_whatever_the_number_of_processes(launch, tmp_path, capsys):
    """50 steps, augmented: the mean over the processes; and the weights and statistics at the end.

    In float64: in float32 the last digits grow a thousandfold in a step here, and any two orders of summing part.
    """
    runs = {}
    for processes in (1, 2, 4):
        finish(launch(str(processes), processes, '--no-validate'))
        runs[processes] = losses_of(tmp_path / str(processes), processes)
        assert len(runs[processes]) == EPOCHS * STEPS == 50
    assert runs[1][50] < runs[1][1] - 0.3
    one, _ = load_checkpoint(tmp_path / '1/epoch_5.pth')
    for processes in (2, 4):
        difference = largest_difference(runs[1], runs[processes])
        several, _ = load_checkpoint(tmp_path / str(processes) / 'epoch_5.pth')
        assert [*several] == [*one]
        farthest = max(float((several[key] - one[key]).abs().max()) for key in one)
        with capsys.disabled():
            print(f'\n{processes} processes: losses within {difference:.1e}, weights within {farthest:.1e}')
        assert difference < 1e-4
        assert farthest < 1e-4
    finish(launch('unsynchronised', 4, '--no-validate', options=['sync_bn=None']))
    assert largest_difference(runs[1], losses_of(tmp_path / 'unsynchronised', 4)) > 0.01


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('processes', 'rank'), [(2, 0), (2, 1), (4, 2)])
def test_one_killed_ends_all(launch, tmp_path, capsys, processes, rank):
    process = launch('run', processes, epochs=500)
    wait_for(tmp_path / 'run/epoch_1.pth', process)
    pids = workers_of(process)
    everyone = descendants(process.pid)
    assert sorted(pids) == list(range(processes))
    start = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    errors = finish(process, status=1)
    seconds = time.monotonic() - start
    with capsys.disabled():
        print(f'\n{processes} processes, process {rank} killed: the end after {seconds:.1f} s')
    assert seconds < 60
    said = f'process {rank} (pid {pids[rank]}) was killed by signal 9 (SIGKILL); the other processes were stopped'
    assert errors.splitlines() == [f'train.py: error: {said}']
    assert not any(Path(f'/proc/{pid}').exists() for pid in everyone)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('script', [True, False], ids=['dist_train.sh', 'torchrun'])
def test_restarts(launch, tmp_path, script, capsys):
    """Two processes of two runs are killed; the losses are those of a run that nobody touched."""
    finish(launch('whole', 2))
    process = launch('run', 2, '--resume', script=script, MAX_RESTARTS='2')
    killed = []
    for epoch, rank in ((1, 1), (3, 0)):
        wait_for(tmp_path / f'run/epoch_{epoch}.pth', process)
        killed.append(workers_of(process)[rank])
        os.kill(killed[-1], signal.SIGKILL)
    errors = finish(process)
    for pid in killed:
        assert len([line for line in errors.splitlines() if f'(pid: {pid})' in line]) == 1
    assert 'Traceback' not in errors
    _, meta = load_checkpoint(tmp_path / 'run/epoch_5.pth')
    assert (meta['epoch'], meta['iter']) == (5, 50)
    difference = largest_difference(losses_of(tmp_path / 'whole', 2), losses_of(tmp_path / 'run', 2))
    with capsys.disabled():
        print(f'\nrestarted twice: losses within {difference:.1e}')
    assert difference == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_then_two_then_one(launch, tmp_path, capsys):
    """With as many images a step, the losses are those of one process from the beginning; with fewer, that is said."""
    finish(launch('whole', 1))
    finish(launch('run', 4, epochs=2))
    shutil.copytree(tmp_path / 'run', tmp_path / 'fewer')
    finish(launch('run', 2, '--resume', epochs=4))
    finish(launch('run', 1, '--resume'))
    lines = [(tmp_path / f'run/losses_{rank}').read_text().splitlines() for rank in range(4)]
    assert [len(rank) for rank in lines] == [50, 40, 20, 20]
    got = {}
    for epochs, processes in ((range(2), 4), (range(2, 4), 2), (range(4, 5), 1)):
        for step in range(STEPS * epochs[0], STEPS * (epochs[-1] + 1)):
            got[step + 1] = sum(float(lines[rank][step].split()[1]) for rank in range(processes)) / processes
    difference = largest_difference(losses_of(tmp_path / 'whole', 1), got)
    with capsys.disabled():
        print(f'\nfour processes, then two, then one: losses within {difference:.1e}')
    assert difference < 1e-4

    finish(launch('fewer', 2, '--resume', epochs=3, options=['train_dataloader.batch_size=8']))
    log = max((tmp_path / 'fewer').glob('*/*.log')).read_text()
    assert 'The checkpoint is of 4 processes with 8 images each, 32 a step, and goes on with 2 of 8, 16 a step' in log
    assert 'For 32 a step again: train_dataloader.batch_size=16.' in log
