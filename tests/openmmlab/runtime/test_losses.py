"""Losses that are NaN or infinite: in mmengine's runner, accumulation, mixed precision and two processes."""

import json
import multiprocessing
import re
from functools import partial

import pytest

pytest.importorskip('mmpretrain')

import torch
import torch.distributed as dist
from helpers.tolerances import assert_close
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import nn

import sk_plugins.openmmlab.runtime  # noqa: F401 - registers the hook
from sk_plugins._resources import find_config
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.openmmlab.runtime.losses import InvalidLossError, InvalidLossHook, name_images, watch_losses

NAN, INF = float('nan'), float('inf')


class Model(BaseModel):
    """A linear layer and a BatchNorm; the batch says what its losses are multiplied with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs, data_samples, factors=None, mode='loss'):
        y = self.norm(self.linear(inputs))
        cls, box = factors or (1.0, 1.0)
        losses = dict(loss_cls=[y.square().mean() * cls, y.mean()], loss_bbox=(y - 1).abs().mean() * box)
        return dict(losses, acc=y.mean() * NAN)


class Loop:
    """As much of a runner as the hook asks for; ``step`` is what EpochBasedTrainLoop does in an iteration."""

    def __init__(self, hook, wrapper=OptimWrapper, model=None, ema=False, **kwargs):
        self.model = model or Model()
        parameters = self.model.parameters()
        self.optim_wrapper = wrapper(optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9), **kwargs)
        self.hook, self.iter, self.train_loop = hook, 0, None
        self.infos, self.warnings = {}, []
        self.logger = self.message_hub = self
        self.warning = self.warnings.append
        self.runtime_info, self.get_info, self.update_info = self.infos, self.infos.get, self.infos.__setitem__
        self.hooks = [hook, EMAHook(momentum=0.1)] if ema else [hook]
        self.call('before_run')
        hook.before_train(self)

    def call(self, place, *args):
        for hook in self.hooks:
            getattr(hook, place)(self, *args)

    def step(self, factors=None, inputs=None, paths=('a.jpg', 'b.jpg')):
        inputs = torch.linspace(-1, 1, 12).reshape(4, 3).sin() * (self.iter + 1) if inputs is None else inputs
        samples = [DataSample(metainfo=dict(img_path=path)) for path in paths]
        batch = dict(inputs=inputs, data_samples=samples, factors=factors)
        self.hook.before_train_iter(self, self.iter, batch)
        outputs = dict(self.model.train_step(batch, self.optim_wrapper))
        self.call('after_train_iter', self.iter, batch, outputs)
        self.iter += 1
        return outputs

    def state(self):
        tensors = dict(self.model.state_dict())
        for i, state in self.optim_wrapper.optimizer.state_dict()['state'].items():
            tensors[f'momentum {i}'] = state['momentum_buffer']
        for hook in self.hooks[1:]:
            tensors.update({f'average {name}': tensor for name, tensor in hook.ema_model.state_dict().items()})
        return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ('factors', 'said'),
    [
        ((NAN, 1.0), 'loss_cls is NaN'),
        ((1.0, INF), 'loss_bbox is infinite'),
        ((INF, NAN), 'loss_cls is infinite and loss_bbox is NaN'),
        ((2.5e38, 2e38), 'loss is infinite'),  # their sum alone
    ],
)
def test_stops_before_the_weights_are_touched(factors, said):
    loop = Loop(InvalidLossHook())
    loop.step()
    before = loop.state()
    with pytest.raises(InvalidLossError) as raised:
        loop.step(factors)
    assert str(raised.value) == f'iteration 2, learning rate 0.1: {said}, images: a.jpg, b.jpg'
    after = loop.state()
    for name in ('linear.weight', 'linear.bias', 'norm.weight', 'norm.bias', *(f'momentum {i}' for i in range(4))):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize('factors', [(NAN, 1.0), (1.0, INF)])
def test_skips_as_if_the_batch_had_not_been(factors):
    loop = Loop(InvalidLossHook('skip'), ema=True)
    assert {'loss', 'loss_cls', 'loss_bbox'} < set(loop.step())
    loop.step()
    before = loop.state()
    assert before['average steps'] == 2
    assert not torch.equal(before['average module.linear.weight'], before['linear.weight'])
    assert loop.step(factors, torch.full((4, 3), NAN)) == {}
    assert_equal(loop.state(), before)
    assert loop.warnings == [
        'iteration 3, learning rate 0.1: loss_cls is NaN and loss_bbox is NaN, images: a.jpg, b.jpg: '
        'step skipped, 1 of at most 10'
    ]
    loop.step()

    straight = Loop(InvalidLossHook(), ema=True)
    straight.step()
    straight.step()
    straight.iter += 1
    straight.step()
    assert_equal(loop.state(), straight.state())


def test_limit_of_skipped_steps():
    hook = InvalidLossHook('skip', limit=2)
    loop = Loop(hook)
    loop.step((NAN, 1.0))
    loop.step()
    loop.step((NAN, 1.0))
    with pytest.raises(InvalidLossError, match=r'^iteration 4, .*: as limit=2 steps are skipped already'):
        loop.step((NAN, 1.0))
    resumed = Loop(InvalidLossHook('skip', limit=2))
    resumed.infos.update(loop.infos)  # mmengine keeps them in checkpoints
    with pytest.raises(InvalidLossError, match='limit=2 steps'):
        resumed.step((NAN, 1.0))


@pytest.mark.parametrize('bad', [(1,), (2,), (0, 1, 2), (2, 3, 4, 5), (6,)])
def test_gradient_accumulation(bad):
    """Of three batches to a step, and seven in all, those that are skipped leave no gradient and the others do."""
    loop = Loop(InvalidLossHook('skip'), accumulative_counts=3)
    loop.optim_wrapper.initialize_count_status(loop.model, 0, 7)
    plain = Model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    good = 0
    for i in range(7):
        loop.step((NAN, 1.0) if i in bad else None)
        inputs = torch.linspace(-1, 1, 12).reshape(4, 3).sin() * (i + 1)
        if i not in bad:
            loss, _ = plain.parse_losses(plain(inputs, None))
            (loss / (1 if i == 6 else 3)).backward()
            good += 1
        if i in (2, 5, 6):
            if good:
                optimizer.step()
            optimizer.zero_grad()
            good = 0
    assert loop.optim_wrapper.inner_count == 7
    assert len(loop.warnings) == len(bad)
    assert_equal(loop.model.state_dict(), plain.state_dict())


def test_average_of_accumulated_batches():
    """A skipped batch at which the weights move all the same, by those before it, counts in the average."""
    loop = Loop(InvalidLossHook('skip'), ema=True, accumulative_counts=2)
    loop.optim_wrapper.initialize_count_status(loop.model, 0, 6)
    steps = []
    for i in range(6):
        before = loop.state()
        loop.step((NAN, 1.0) if i in (2, 5) else None)
        after = loop.state()
        steps.append(int(after['average steps']))
        moved = not torch.equal(after['average module.linear.weight'], before['average module.linear.weight'])
        assert moved == (i in (1, 3, 4, 5))
    assert steps == [1, 2, 2, 3, 4, 5]


def test_mixed_precision(monkeypatch):
    """The gradient scaler's own: neither its scale nor its count of good steps moves with a skipped step."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, device='cpu'))
    loop = Loop(InvalidLossHook('skip'), AmpOptimWrapper, loss_scale=dict(init_scale=8.0))
    loop.step()
    before, scaler = loop.state(), loop.optim_wrapper.loss_scaler.state_dict()
    assert (scaler['scale'], scaler['_growth_tracker']) == (8.0, 1)
    loop.step((NAN, 1.0))
    assert_equal(loop.state(), before)
    assert loop.optim_wrapper.loss_scaler.state_dict() == scaler
    # A gradient that overflows under a finite loss is the scaler's.
    loop.step((1.0, 1e38))
    assert len(loop.warnings) == 1
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert loop.optim_wrapper.loss_scaler.get_scale() == 4.0


def _process(rank, store, action, counts, queue):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    model = MMDistributedDataParallel(Model(), broadcast_buffers=False)
    loop = Loop(InvalidLossHook(action), model=model, accumulative_counts=counts)
    said = ''
    try:
        for i in range(4):
            # Each process has other images, and at the second step only the second process has a NaN.
            inputs = torch.linspace(-1, 1, 12).reshape(4, 3).sin() * (i + 1 + rank)
            bad = rank == 1 and i == 1
            loop.step((NAN, 1.0) if bad else None, inputs, paths=[f'rank{rank}_{i}.jpg'])
    except InvalidLossError as error:
        said = str(error)
    queue.put((rank, loop.iter, said, loop.warnings, {k: v.tolist() for k, v in model.module.state_dict().items()}))
    dist.destroy_process_group()


@pytest.mark.parametrize(('action', 'counts'), [('stop', 1), ('skip', 1), ('skip', 2)])
def test_two_processes_agree(action, counts, tmp_path):
    context = multiprocessing.get_context('fork')
    queue, store = context.SimpleQueue(), tmp_path / 'store'
    processes = [
        context.Process(target=_process, args=(i, store, action, counts, queue), daemon=True) for i in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    (_, *first), (_, *second) = sorted(queue.get() for _ in processes)
    said = 'iteration 2, learning rate 0.1: process 1: loss_cls is NaN, images: rank1_1.jpg'
    if action == 'stop':
        assert first[:3] == second[:3] == [1, said, []]
    else:
        warnings = [f'{said}: step skipped, 1 of at most 10']
        assert first[:3] == second[:3] == [4, '', warnings]
    for name in ('linear.weight', 'linear.bias', 'norm.weight', 'norm.bias'):
        assert first[3][name] == second[3][name]

    # What one process would do with the batches of both.
    if action == 'skip':
        models = [Model(), Model()]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
        for i in range(4):
            if i != 1:
                for rank, model in enumerate(models):
                    inputs = torch.linspace(-1, 1, 12).reshape(4, 3).sin() * (i + 1 + rank)
                    (model.parse_losses(model(inputs, None))[0] / counts).backward()
            if (counts == 1 and i != 1) or (counts == 2 and i % 2):
                for one, other in zip(models[0].parameters(), models[1].parameters()):
                    one.grad = other.grad = (one.grad + other.grad) / 2
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        expected = torch.tensor(first[3]['linear.weight'])
        assert_close(models[0].linear.weight.detach(), expected, length=3 * 4 * 8)  # in each of up to eight steps


# The runner

SMALL = {
    'train_cfg.max_epochs': 2,
    'train_dataloader.batch_size': 4,
    'train_dataloader.dataset.indices': 16,
    'val_cfg': None,
    'val_dataloader': None,
    'val_evaluator': None,
    'default_hooks.checkpoint.save_best': None,
    'model.backbone.norm_cfg.type': 'BN',
    'model.backbone.layers': (1, 1, 1, 1),
    'model.backbone.channels': (16, 16, 16, 16),
    'model.head.in_channels': 64,
    'default_hooks.logger.interval': 2,
}


@HOOKS.register_module(force=True)
class SpoilImages(Hook):
    """NaN in place of a pixel of the batches of some iterations; keeps what it then finds in model and average."""

    priority = 'LOW'

    def __init__(self, iterations):
        self.iterations = iterations
        self.seen = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in self.iterations:
            data_batch['inputs'] = data_batch['inputs'].float()
            data_batch['inputs'][2, 0, 5, 5] = NAN

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        (average,) = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        state = {**runner.model.state_dict(), **{f'average {k}': v for k, v in average.state_dict().items()}}
        self.seen[runner.iter] = {k: v.clone() for k, v in state.items()}


def runner(work_dir, iterations, **options):
    config = Config.fromfile(find_config('sknet_digits'))
    config.merge_from_dict({**SMALL, **options})
    config.work_dir = str(work_dir)
    config.experiment_name = work_dir.name
    config.custom_hooks = [dict(type='SpoilImages', iterations=iterations), dict(type='EMAHook', momentum=0.1)]
    watch_losses(config)
    return Runner.from_cfg(config)


def test_runner_stops(tmp_path):
    run = runner(tmp_path, [5])
    with pytest.raises(InvalidLossError) as raised:
        run.train()
    said = r'iteration 6 \(epoch 2\), learning rate [\d.e-]+: loss is NaN, images: (number \d+ of the data set(, )?){4}'
    assert re.fullmatch(said, str(raised.value))
    assert not (tmp_path / 'epoch_2.pth').exists()
    assert all(tensor.isfinite().all() for tensor in run.model.parameters())


def test_runner_skips(tmp_path):
    run = runner(
        tmp_path, [1, 5], **{'default_hooks.invalid_loss.action': 'skip', 'default_hooks.invalid_loss.limit': 2}
    )
    run.train()
    (witness,) = [hook for hook in run.hooks if isinstance(hook, SpoilImages)]
    for i in (1, 5):
        assert_equal(witness.seen[i], witness.seen[i - 1])
    for name in ('head.fc.weight', 'average module.head.fc.weight'):
        assert not torch.equal(witness.seen[3][name], witness.seen[2][name])
    assert witness.seen[7]['average steps'] == 6
    checkpoint = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    for key in ('state_dict', 'ema_state_dict'):
        assert all(tensor.isfinite().all() for tensor in checkpoint[key].values())
    assert checkpoint['message_hub']['runtime_info']['skipped_steps'] == 2
    (log,) = tmp_path.glob('*/*.log')
    skipped = [line for line in log.read_text().splitlines() if 'step skipped' in line]
    assert [line.rpartition('step skipped, ')[2] for line in skipped] == ['1 of at most 2', '2 of at most 2']
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    losses = [row['loss'] for row in map(json.loads, scalars.read_text().splitlines()) if 'loss' in row]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)


def test_into_a_config():
    cfg = Config(dict(default_hooks=dict(timer=dict(type='IterTimerHook'))))
    watch_losses(cfg)
    assert cfg.default_hooks.invalid_loss == dict(type='InvalidLossHook')
    assert cfg.default_hooks.timer.type == 'IterTimerHook'
    cfg = Config()
    watch_losses(cfg)
    assert cfg.default_hooks == dict(invalid_loss=dict(type='InvalidLossHook'))
    cfg = Config(dict(default_hooks=dict(invalid_loss=dict(action='skip'))))
    watch_losses(cfg)
    assert cfg.default_hooks.invalid_loss == dict(type='InvalidLossHook', action='skip')
    cfg = Config(dict(default_hooks=dict(invalid_loss=None)))
    watch_losses(cfg)
    assert cfg.default_hooks == {}
    own = InvalidLossHook('skip')
    cfg = Config(dict(default_hooks=dict(invalid_loss=own)))
    watch_losses(cfg)
    assert cfg.default_hooks.invalid_loss is own
    said = r"^default_hooks\.invalid_loss='stop' must be a dict .*\.invalid_loss\.action is 'stop' or 'skip'$"
    with pytest.raises(ConfigError, match=said):
        watch_losses(Config(dict(default_hooks=dict(invalid_loss='stop'))))


def test_arguments():
    with pytest.raises(ValueError, match=r"^action='go' is unknown: choose one of 'stop', 'skip'$"):
        InvalidLossHook('go')
    with pytest.raises(ValueError, match=r'^limit=0 must be an integer of at least 1$'):
        InvalidLossHook('skip', limit=0)


def test_names_of_images():
    samples = [DataSample(metainfo=dict(img_path='é.jpg', sample_idx=3)), DataSample(metainfo=dict(sample_idx=4))]
    assert name_images(dict(data_samples=samples)) == 'é.jpg, number 4 of the data set'
    assert name_images(dict(data_samples=[DataSample()])) == name_images([1, 2]) == 'not known to the batch'
