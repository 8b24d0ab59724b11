"""The trial of the GPU's engine: what it measures decides, once for a device, and nothing it meets stops a user.

No GPU is needed: a stand-in for a tensor says that it is on one, and stand-ins measure what a test says.
"""

import contextlib
import copy
import json
import logging
import math
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sk_plugins.fuse import fold_batch_norm
from sk_plugins.ops import gpu, trial

FASTER = {'training': {'small': 0.5, 'large': 0.7}, 'inference': {'small': 0.6, 'large': 0.8}}
FASTER['folded inference'] = {'small': 0.3, 'large': 0.4}
FASTER['frozen norms'] = {'small': 0.2, 'large': 0.1}


class OnGPU:
    """As much of a tensor on a GPU as a trial asks for."""

    is_cuda = True

    def __init__(self, shape=trial.LARGE, dtype=torch.float32, index=0, channels_last=True):
        self.device, self.dtype, self.shape = torch.device('cuda', index), dtype, torch.Size(shape)
        self.channels_last = channels_last

    def stride(self, dim):
        return {1: 1 if self.channels_last else math.prod(self.shape[2:])}[dim]

    def get_device(self):
        return self.device.index

    def numel(self):
        return self.shape.numel()


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """What the measurements find, settable, and how often they ran: of one process whose verdicts nobody knows."""
    found = SimpleNamespace(error=0.0, ratios=copy.deepcopy(FASTER), tried=[], devices=[], capturing=False)
    monkeypatch.setenv('SK_PLUGINS_CACHE', str(tmp_path))
    monkeypatch.delenv('SK_PLUGINS_ENGINE', raising=False)
    monkeypatch.setattr(gpu, 'HAS_TRITON', True)
    monkeypatch.setattr(gpu, 'load', lambda: None)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A card')
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: found.capturing)

    @contextlib.contextmanager
    def device(device):
        found.devices.append((threading.get_ident(), device))
        yield

    def error(device, dtype, norm, memory_format):
        assert (norm, torch.is_grad_enabled()) in trial.KINDS.values()
        found.tried.append((device, dtype, norm, memory_format))
        if isinstance(found.error, Exception):
            raise found.error
        return found.error

    monkeypatch.setattr(torch.cuda, 'device', device)
    monkeypatch.setattr(trial, '_compile', lambda *subject: None)
    monkeypatch.setattr(trial, '_error', error)
    monkeypatch.setattr(trial, '_Work', lambda shape, *subject: shape)

    def ratio(norm, work, device):
        (kind,) = (kind for kind, of_kind in trial.KINDS.items() if of_kind == (norm, torch.is_grad_enabled()))
        return found.ratios[kind]['small' if work == trial.SMALL else 'large']

    monkeypatch.setattr(trial, '_ratio', ratio)
    monkeypatch.setattr(trial, '_said', set())
    trial._verdicts.clear()
    yield found
    trial._verdicts.clear()


def accepts(x, norm='batch', wanted=False):
    return trial.accepts(x, norm, wanted)


def new_process():
    trial._verdicts.clear()
    trial._said.clear()


def test_what_is_right_and_faster_is_taken_and_told_in_one_line(bench, caplog):
    with caplog.at_level(logging.INFO, 'sk_plugins'):
        for _ in range(3):
            assert accepts(OnGPU())
            with torch.no_grad():
                assert accepts(OnGPU(trial.SMALL), 'running')
    assert [norm for _, _, norm, _ in bench.tried] == ['batch', 'running']
    for record, kind in zip(caplog.records, ('training', 'inference'), strict=True):
        assert record.levelname == 'INFO'
        ratios = ', '.join(f'{size} {ratio:.2f}' for size, ratio in FASTER[kind].items())
        assert f'time by that of plain torch: {ratios} (' in record.getMessage()
        assert f'A card, float32, channels_last, {kind}, torch ' in record.getMessage()


@pytest.mark.parametrize('slow', [(kind, size) for kind in FASTER for size in trial.SIZES], ids=' '.join)
def test_what_is_slower_is_not_taken_for_that_size_and_kind(bench, slow):
    bench.ratios[slow[0]][slow[1]] = 1.01
    for size, shape in trial.SIZES.items():
        for kind, (norm, gradients) in trial.KINDS.items():
            with torch.set_grad_enabled(gradients):
                assert accepts(OnGPU(shape), norm) == ((kind, size) != slow)
                assert accepts(OnGPU(shape), norm, wanted=True)


def test_each_kind_of_work_is_tried_when_it_is_met(bench):
    """A training run does not wait for what inference would take."""
    for _ in range(2):
        accepts(OnGPU())
    assert bench.tried == [(torch.device('cuda', 0), torch.float32, 'batch', torch.channels_last)]
    accepts(OnGPU(channels_last=False))
    assert bench.tried[1:] == [(torch.device('cuda', 0), torch.float32, 'batch', torch.contiguous_format)]
    with torch.no_grad():
        accepts(OnGPU(), 'folded')
        accepts(OnGPU())  # as in reentrant checkpoints: a training step's, which are known
    accepts(OnGPU(), 'running')  # as detectors train, whose norms are frozen
    assert [norm for _, _, norm, _ in bench.tried[2:]] == ['folded', 'running']


def test_threads_that_meet_a_device_at_once_make_one_trial(bench, monkeypatch):
    begun = threading.Barrier(4)

    def meet():
        begun.wait()
        return accepts(OnGPU())

    monkeypatch.setattr(trial, '_compile', lambda *subject: time.sleep(0.05))
    with ThreadPoolExecutor(4) as pool:
        assert all(future.result() for future in [pool.submit(meet) for _ in range(4)])
    assert len(bench.tried) == 1


def test_what_a_compiler_is_told(bench, monkeypatch):
    device = torch.device('cuda', 0)
    assert not trial.is_refused(device)
    assert bench.tried == []
    accepts(OnGPU(dtype=torch.float64))  # which is no fault of theirs
    accepts(OnGPU())
    assert not trial.is_refused(device)
    bench.error = 0.5
    accepts(OnGPU(dtype=torch.float16))
    assert trial.is_refused(device)
    new_process()
    assert trial.is_refused(device)
    # Of another card, whose name begins as this one's, or of another version, it says nothing.
    with monkeypatch.context() as other:
        other.setattr(torch.cuda, 'get_device_name', lambda device: 'A car')
        assert not trial.is_refused(device)
    with monkeypatch.context() as other:
        other.setattr(trial, '_version', lambda name: '99')
        assert not trial.is_refused(device)
    assert trial.is_refused(device)
    trial.forget()
    assert not trial.is_refused(device)
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'plain')
    assert trial.is_refused(device)


def test_sizes_part_at_the_geometric_mean(bench):
    """SMALL has 2**17 elements and LARGE 25,690,112: 1,835,008 lie between."""
    bench.ratios['training']['small'] = 2.0
    assert not accepts(OnGPU((1, 1, 1, 1_835_007)))
    assert accepts(OnGPU((1, 1, 1, 1_835_009)))


@pytest.mark.parametrize('error', [0.5, float('nan'), float('inf')])
def test_what_is_wrong_is_refused_with_a_warning_and_remembered(bench, error, caplog):
    bench.error = error
    for _ in range(2):
        assert not accepts(OnGPU(), wanted=True)
        assert not accepts(OnGPU())
        new_process()
    assert len(bench.tried) == 1
    (record,) = [r for r in caplog.records if r.levelname == 'WARNING']
    assert 'not used on A card, float32' in record.getMessage()
    assert f'they differ from plain torch by {error:.1e}' in record.getMessage()


@pytest.mark.parametrize('error', [RuntimeError('no C compiler'), torch.OutOfMemoryError('full')])
def test_a_failure_gives_way_to_plain_torch_in_this_process_alone(bench, error, caplog):
    bench.error = error
    assert not accepts(OnGPU())
    assert not accepts(OnGPU(), wanted=True)
    (record,) = caplog.records
    assert f'a kernel failed ({type(error).__name__}: {error})' in record.getMessage()
    assert len(bench.tried) == 1
    new_process()
    bench.error = 0.0
    assert accepts(OnGPU())


@pytest.mark.parametrize('room', [1, 3, 64])
def test_where_memory_is_short_a_smaller_batch_is_timed(bench, monkeypatch, room):
    measured, tried = trial._ratio, []

    def ratio(norm, work, device):
        tried.append(work)
        if work[1:] == trial.LARGE[1:] and work[0] > room:
            raise torch.OutOfMemoryError('full')
        return measured(norm, work, device)

    monkeypatch.setattr(trial, '_ratio', ratio)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: tried.append('emptied'))
    bench.ratios['training'] = {'small': 0.5, 'large': 0.25}
    assert accepts(OnGPU())
    _, *rest = trial.LARGE
    large = tried[tried.index(trial.LARGE) :]
    assert large[::2] == [(size, *rest) for size in (64, 32, 16, 8, 4, 2, 1) if size > room // 2]
    assert set(large[1::2]) <= {'emptied'}
    (kept,) = json.loads(trial.cache_file().read_text()).values()
    assert kept == {'wrong': None, 'ratios': {'small': 0.5, 'large': 0.25}}


def test_where_memory_has_no_room_for_one_image_plain_torch_runs(bench, monkeypatch, caplog):
    def ratio(*args):
        raise torch.OutOfMemoryError('full')

    monkeypatch.setattr(trial, '_ratio', ratio)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    assert not accepts(OnGPU())
    assert 'OutOfMemoryError: full' in caplog.records[-1].getMessage()
    assert not trial.cache_file().exists()


def test_no_trial_within_a_capture_or_a_backward_pass(bench):
    bench.capturing = True
    assert not accepts(OnGPU())
    bench.capturing = False

    class Meets(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            assert not accepts(OnGPU())
            return grad

    Meets.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert bench.tried == []
    assert accepts(OnGPU())
    assert len(bench.tried) == 1
    bench.capturing = True
    assert accepts(OnGPU())


def test_a_verdict_is_of_a_device_a_dtype_and_versions(bench, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert accepts(OnGPU(dtype=dtype))
    assert [dtype for _, dtype, _, _ in bench.tried] == [torch.float32, torch.bfloat16, torch.float16]
    new_process()
    assert accepts(OnGPU())  # from disk
    assert len(bench.tried) == 3
    kept = json.loads(trial.cache_file().read_text())
    assert len(kept) == 3
    assert all(key.startswith('A card, ') and ', triton ' in key and ', engine ' in key for key in kept)
    assert all(verdict == {'wrong': None, 'ratios': FASTER['training']} for verdict in kept.values())
    for owner, name, value in (
        (torch.cuda, 'get_device_name', 'Another card'),
        (trial, '_version', '0'),
        (trial, '_fingerprint', '0'),
    ):
        new_process()
        monkeypatch.setattr(owner, name, lambda *args, value=value: value)
        assert accepts(OnGPU())
    assert len(bench.tried) == 6
    trial.forget()
    assert not trial.cache_file().exists()
    assert accepts(OnGPU())
    assert len(bench.tried) == 7


def test_a_change_of_the_engine_is_another_engine(tmp_path, monkeypatch):
    shutil.copytree(Path(trial.__file__).parent, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.pyc'))
    monkeypatch.setattr(trial.importlib.resources, 'files', lambda package: tmp_path)
    fingerprint = trial._fingerprint.__wrapped__
    before = fingerprint()
    assert before == trial._fingerprint()
    (tmp_path / 'notes.txt').write_text('no part of it')
    assert fingerprint() == before
    with open(tmp_path / 'gpu_kernels.py', 'a') as file:
        file.write('# another\n')
    assert fingerprint() != before


@pytest.fixture
def autocast(monkeypatch):
    """bfloat16, as on a GPU: torch takes none where it finds no GPU."""
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: device == 'cuda')
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: torch.bfloat16)


def test_autocast_says_the_dtype(bench, autocast):
    accepts(OnGPU())
    assert [dtype for _, dtype, _, _ in bench.tried] == [torch.bfloat16]


@pytest.mark.parametrize('casts', [False, True])
def test_float64_is_for_plain_torch_and_said_once(bench, casts, request, caplog):
    if casts:
        request.getfixturevalue('autocast')  # which leaves float64 alone
    for _ in range(2):
        assert not accepts(OnGPU(dtype=torch.float64), wanted=True)
    (record,) = caplog.records
    assert 'torch.float64: the kernels take float32, bfloat16 and float16' in record.getMessage()
    assert not bench.tried


def test_without_triton_plain_torch_runs_and_says_so(bench, monkeypatch, caplog):
    monkeypatch.setattr(gpu, 'HAS_TRITON', False)
    assert not accepts(OnGPU())
    assert 'triton is not installed' in caplog.text


def test_the_environment_overrides(bench, monkeypatch, caplog):
    bench.ratios['training'] = dict.fromkeys(trial.SIZES, 5.0)
    assert not accepts(OnGPU())
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'triton')
    new_process()
    assert accepts(OnGPU())
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'plain')
    new_process()
    assert not accepts(OnGPU(), wanted=True)
    assert not caplog.records
    assert not accepts(torch.zeros(1, 1, 1, 1))  # in the interpreter, too
    bench.error = 1.0
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'triton')
    trial.forget()
    assert not accepts(OnGPU())  # no one gets wrong numbers


def test_an_unknown_engine_in_the_environment_is_named(bench, monkeypatch):
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'cuda')
    for x in (OnGPU(), torch.zeros(1, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"SK_PLUGINS_ENGINE='cuda' .* must be 'plain' or 'triton', or unset"):
            accepts(x)
    monkeypatch.setenv('SK_PLUGINS_ENGINE', '')
    assert accepts(OnGPU())


@pytest.mark.parametrize(
    'text',
    ['', '{', '[]', '5', 'null', '{"KEY": null}', '{"KEY": []}', '{"KEY": {}}', '{"KEY": {"wrong": null}}',
     '{"KEY": {"wrong": null, "ratios": {"small": 0.5}}}', '{"KEY": {"wrong": 5, "ratios": {}}}', '\udcff'],
)  # fmt: skip
def test_a_corrupt_file_is_as_good_as_none(bench, text):
    key = trial._key(torch.device('cuda', 0), torch.float32, 'training', torch.channels_last)
    trial.cache_file().write_bytes(text.replace('KEY', key).encode('utf-8', 'surrogateescape'))
    assert accepts(OnGPU())
    assert len(bench.tried) == 1
    assert json.loads(trial.cache_file().read_text()) == {key: {'wrong': None, 'ratios': FASTER['training']}}
    assert [path.name for path in trial.cache_file().parent.iterdir()] == ['engines.json']


def test_where_nothing_can_be_kept_the_verdict_holds_for_the_process(bench, monkeypatch, tmp_path, caplog):
    (tmp_path / 'file').write_text('')
    for name, value in (('SK_PLUGINS_CACHE', str(tmp_path / 'file' / 'folder')), ('HOME', None)):
        if value is None:
            monkeypatch.delenv('SK_PLUGINS_CACHE')
            monkeypatch.delenv('XDG_CACHE_HOME', raising=False)

            def no_home():
                raise RuntimeError('Could not determine home directory.')

            monkeypatch.setattr(trial.Path, 'home', no_home)
        else:
            monkeypatch.setenv(name, value)
        new_process()
        caplog.clear()
        for _ in range(2):
            assert accepts(OnGPU())
        (record,) = [r for r in caplog.records if r.levelname == 'WARNING']
        assert 'cannot be kept' in record.getMessage()
    assert len(bench.tried) == 2


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(bench, caplog):
    trial.cache_file().mkdir(parents=True)
    assert accepts(OnGPU())
    assert 'cannot be kept' in caplog.text
    assert list(trial.cache_file().parent.iterdir()) == [trial.cache_file()]


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv('SK_PLUGINS_CACHE', str(tmp_path / 'own'))
    assert trial.cache_file() == tmp_path / 'own' / 'engines.json'
    monkeypatch.delenv('SK_PLUGINS_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    assert trial.cache_file() == tmp_path / 'cache' / 'sk-plugins' / 'engines.json'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(trial.Path, 'home', lambda: tmp_path)
    assert trial.cache_file() == tmp_path / '.cache' / 'sk-plugins' / 'engines.json'


def test_it_runs_on_the_tensors_device_in_a_thread_of_its_own(bench, monkeypatch, caplog):
    """A new thread's current device is the first one, on which kernels for another's tensors would be launched."""
    assert not accepts(OnGPU(index=1))  # cuda:0 is the current one
    assert 'tensors on cuda:1, which is not the current device' in caplog.text
    assert not bench.tried
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    assert accepts(OnGPU(index=1))
    ((thread, device),) = bench.devices
    assert device == torch.device('cuda', 1)
    assert thread != threading.get_ident()


def test_a_known_verdict_costs_few_calls(bench):
    x = OnGPU()
    accepts(x)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == 'call' else None)
    try:
        trial.accepts(x, 'batch')
    finally:
        sys.setprofile(None)
    assert [name for name in calls if name != '<lambda>'] == ['accepts', 'get_device', 'stride', 'numel']


@pytest.mark.skipif(not gpu.HAS_TRITON, reason='triton is not installed')
@pytest.mark.parametrize('kind', trial.KINDS)
def test_the_work_is_the_same_by_the_engine_and_in_plain_torch(kind):
    """Without a GPU: what each gives has the same shapes, and both count a training step's batches or none."""
    from sk_plugins.ops import stubbed_launches

    norm, gradients = trial.KINDS[kind]
    for part in ('', '_of_two', '_of_one'):
        work = trial._Work((3, 40, 9, 9), torch.device('cpu'), torch.float32)
        with stubbed_launches(), torch.set_grad_enabled(gradients):
            found = [work.run(getattr(work, f'{way}{part}'), norm) for way in ('engine', 'plain')]
        assert found[0][0].shape == (3, 40, 9, 9)
        shapes = [[tensor.shape for tensor in tensors] for tensors in found]
        assert shapes[0] == shapes[1]
        assert len(shapes[0]) == 1 + gradients * {'': 13, '_of_two': 6, '_of_one': 3}[part]


@pytest.mark.skipif(not gpu.HAS_TRITON, reason='triton is not installed')
@pytest.mark.parametrize('kind', trial.KINDS)
def test_a_trial_runs_the_kernels_that_are_then_used(kind):
    """Those of units with and without a shortcut's norm and of the stem, told apart by what they are compiled for."""
    import timm

    from sk_plugins.ops import stubbed_launches

    norm, gradients = trial.KINDS[kind]
    model = timm.create_model('sknet26', num_classes=0).train(norm == 'batch')
    if norm == 'folded':
        model = fold_batch_norm(model)
    work = trial._Work(trial.CHECKED, torch.device('cpu'), torch.float32)

    def kernels(run):
        """Names and constants of what is launched, but for those that follow the map's size."""
        seen = set()

        def launch(kernel, tensors, kind, describe):
            sizes = 'BLOCK_', 'WIDE', 'num_warps'
            constants = {name: value for name, value in describe()[3].items() if not name.startswith(sizes)}
            seen.add((kernel.fn.__name__, *constants.items()))

        with pytest.MonkeyPatch.context() as patch, stubbed_launches(), torch.set_grad_enabled(gradients):
            patch.setattr(gpu.kernels, 'launch', launch)
            run()
        return seen

    def use():
        output = model(torch.randn(2, 3, 64, 64))
        if gradients:
            output.sum().backward()

    used = kernels(use)
    tried = kernels(lambda: [work.run(f, norm) for f in (work.engine, work.engine_of_two, work.engine_of_one)])
    assert used
    assert used <= tried
