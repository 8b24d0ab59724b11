"""Checkpoints that are whole or not there at all, and runs that go on from one as if they had never stopped.

:class:`ResumableCheckpointHook` takes the place of mmengine's ``CheckpointHook``. What mmengine restores is left to
it: weights, optimizer, schedules, averaged weights, logs, the best score. Random generators are not restored but
seeded: for a training step from the seed and the iteration, for a sample's augmentation from the seed, the epoch and
the sample's place in it. So neither depends on the process that draws them, nor on what it drew before.
"""

import contextlib
import inspect
import operator
import os
import random
import shutil
import zipfile
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import broadcast_object_list, get_dist_info, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Sampler, get_worker_info

from ..._files import write_atomically
from ...weights.files import CheckpointError, read_pickle
from .._internals import CheckpointSteps, get_start, set_start
from .configs import ConfigError
from .distributed import unwrap

__all__ = [
    'ResumableCheckpointHook',
    'find_resumable',
    'make_resumable',
]

_BROKEN = ' cannot be read: '
# What a random number is for: a step's must not be a sample's.
_STEP, _SAMPLE = 0, 1


# Files


@register_backend('whole')
class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, but that it writes atomically."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with write_atomically(filepath) as partial:
            partial.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


class _Keeper:
    """A file backend that removes nothing and tells ``names`` what it was to remove from ``folder``."""

    def __init__(self, backend: Any, folder: str, names: list[str]) -> None:
        self._backend, self._folder, self._names = backend, folder, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        if _same_folder(os.path.dirname(path), self._folder):
            self._names.append(os.path.basename(path))

    rmtree = remove  # DeepSpeed's checkpoints are folders


def _same_folder(a: str, b: str) -> bool:
    return a == b or os.path.realpath(a) == os.path.realpath(b)


def find_resumable(work_dir: str | os.PathLike, *folders: str | os.PathLike) -> tuple[str | None, list[str]]:
    """The last whole checkpoint that a run can go on from, and what had to be passed over.

    That which ``work_dir/last_checkpoint`` names, if it is whole, by its name in ``work_dir`` and ``folders``, which
    may have been moved or copied. Else, of the training checkpoints there, the one that was saved last. Where there is
    none, what ``last_checkpoint`` names elsewhere. Nothing that a file holds is run.

    Args:
        work_dir: the run's.
        folders: where else it keeps checkpoints.

    Returns:
        The path, None where there is none, and a line for each file passed over. An address (``s3://...``) that
        ``last_checkpoint`` names is not looked into.
    """
    places = [Path(work_dir), *map(Path, folders)]
    passed_over: dict[str, str] = {}
    pointer, elsewhere = places[0] / 'last_checkpoint', None
    if pointer.is_file():
        named = pointer.read_text(errors='replace').strip('\0 \n')
        if '://' in named:
            return named, []
        found = next((p for p in (place / Path(named).name for place in places) if p.is_file()), None)
        if not named:
            passed_over[str(pointer)] = 'is empty'
        elif found is not None:
            try:
                if _read_meta(found) is not None:
                    return str(found), []
                passed_over[str(found)] = 'holds weights but no training state'
            except CheckpointError as error:
                passed_over[str(found)] = _reason(error, found)
        elif Path(named).is_file():
            elsewhere = named
            passed_over[str(pointer)] = f'names {named}, which is in none of the folders of this run'
        else:
            passed_over[str(pointer)] = f'names {named}, which is not there'
    saved = []
    for path in dict.fromkeys(p for place in places for p in sorted(place.glob('*.pth')) if p.is_file()):
        if str(path) not in passed_over:
            try:
                meta = _read_meta(path)
            except CheckpointError as error:
                passed_over[str(path)] = _reason(error, path)
            else:
                if meta is not None:
                    saved.append((str(meta.get('time', '')), meta['iter'], str(path)))
    if not saved and elsewhere is not None:
        try:
            if _read_meta(Path(elsewhere)) is not None:
                saved.append((elsewhere,))
        except CheckpointError as error:
            passed_over[elsewhere] = _reason(error, Path(elsewhere))
    return (max(saved)[-1] if saved else None), [f'{path} {reason}' for path, reason in passed_over.items()]


def _reason(error: CheckpointError, path: Path) -> str:
    said = ' '.join(str(error).removeprefix(f'{path}: ').split())
    return _BROKEN.lstrip() + said.removeprefix('cannot be read as weights: ')


def _read_meta(path: Path) -> Mapping[str, Any] | None:
    """The ``meta`` of a training checkpoint, None for one of weights alone; CheckpointError if it is not whole."""
    with open(path, 'rb') as file:
        beginning = file.read(4)
    if not beginning:
        raise CheckpointError(f'{path}: it has no content')
    if beginning == b'PK\3\4' and not zipfile.is_zipfile(path):
        raise CheckpointError(f'{path}: it is cut off')
    checkpoint = read_pickle(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(meta.get('iter'), int) or 'optimizer' not in checkpoint:
        return None
    return meta


# Random numbers and the order of the data


def _seed(*key: int) -> tuple[int, ...]:
    return tuple(int(word) for word in np.random.SeedSequence(key).generate_state(3))


def _start_random(*key: int, devices: bool = True) -> None:
    """Start the random numbers of python, numpy and torch, there with or without those of its devices."""
    for_python, for_numpy, for_torch = _seed(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)
    if devices:
        torch.manual_seed(for_torch)
    else:
        torch.default_generator.manual_seed(for_torch)


@contextlib.contextmanager
def _random_as_before() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededBatch(list):
    """The indices of a batch. The random generators are seeded before each, when a DataLoader fetches the samples.

    Args:
        indices: the data set's.
        key: non-negative numbers that the random numbers are made from.
        places: one more for every index.
    """

    def __init__(self, indices: Sequence[Any], key: tuple[int, ...], places: Sequence[int]) -> None:
        super().__init__(indices)
        self.key, self.places = key, places

    def __iter__(self) -> Iterator[Any]:
        # Every worker has random numbers of its own.
        with _random_as_before() if get_worker_info() is None else contextlib.nullcontext():
            for index, place in zip(super().__iter__(), self.places):
                _start_random(*self.key, place, devices=False)
                yield index

    def __reduce__(self) -> tuple:
        return SeededBatch, (list(super().__iter__()), self.key, self.places)


class ResumableBatches(Sampler):
    """The batches of another batch sampler, as :class:`SeededBatch`, from any one on.

    Args:
        batches: the batch sampler.
        seed: of the augmentation.
        endless: whether the next epoch follows, and so on; else one is one iteration.

    Attributes:
        epoch: the number of the epoch, which the augmentation depends on.
        skip: how many batches the next iteration leaves out: their indices are drawn, their samples are not read.
    """

    def __init__(self, batches: Sampler, seed: int, endless: bool = False) -> None:
        self.batches, self.seed, self.endless = batches, seed, endless
        self.epoch = self.skip = 0

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # not yet there, in copying
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        skip, self.skip = self.skip, 0
        rank, world_size = get_dist_info()
        while True:
            place = rank
            for batch in self.batches:
                places = range(place, place + len(batch) * world_size, world_size)
                place = places.stop
                if skip:
                    skip -= 1
                else:
                    yield SeededBatch(batch, (self.seed, _SAMPLE, self.epoch), places)
            if not self.endless or place == rank:
                return
            self.epoch += 1
            set_epoch = getattr(getattr(self.batches, 'sampler', None), 'set_epoch', None)
            if set_epoch is not None:
                set_epoch(self.epoch)


class _Endless:
    """In place of IterBasedTrainLoop's iterator, where the loader's batches are endless and start where they should."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, number: int) -> None:
        """Nothing: the batch sampler does it, and reads no sample of theirs."""


# The hook


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointSteps):
    """mmengine's ``CheckpointHook``, with its arguments, for runs that may be killed at any moment.

    - A file is whole or not there; ``last_checkpoint`` names one that is; what is outdated is removed when what
      takes its place, and the name of that, is on the disk.
    - ``resume=True`` without ``load_from`` goes on from :func:`find_resumable`.
    - After validation, a checkpoint of the same moment is written again. If the run was killed before that, the
      resumed run validates first.
    - A run goes on in the middle of an epoch, where a checkpoint is from there, and in the middle of an accumulation
      of gradients, where there is one process. Early stopping keeps its count.
    - The random numbers are those of the module's docstring.

    With the same number of processes, the same arithmetic, and transforms without a memory of their own, a resumed
    run's weights are those of one that never stopped, bit for bit.

    Args:
        start_from: what ``load_from`` would be where there is no checkpoint yet that ``resume=True`` could go on from.
        ties_to_last: whether of equal scores the later is the best, as suits few validation images; mmengine's choice
            is the first.
        *args: ``CheckpointHook``'s.
        **kwargs: ``CheckpointHook``'s.
    """

    def __init__(self, *args, start_from: str | None = None, ties_to_last: bool = False, **kwargs) -> None:
        if ties_to_last:
            self.rule_map = {'greater': operator.ge, 'less': operator.le}
        super().__init__(*args, **kwargs)
        self.start_from = start_from
        self._loaded: dict[str, Any] = {}
        self._batches: ResumableBatches | None = None
        self._position = 0  # in the epoch
        self._resumed_position = 0
        self._validated = -1  # the iteration it was at
        self._saved: int | None = None  # the last step
        self._outdated: list[str] = []

    # What is saved

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if 'optimizer' not in checkpoint:
            return
        endless = self._batches is not None and self._batches.endless
        early = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
        checkpoint['resuming'] = dict(
            position=self._position,
            batches=0 if endless else len(runner.train_dataloader),
            validated=self._validated,
            sampler_seed=getattr(_sampler(runner.train_dataloader), 'seed', None),
            early_stopping=[(float(hook.best_score), hook.wait_count) for hook in early],
            stopped=bool(early and runner.train_loop.stop_training),
            folder=str(self.out_dir),
            outdated=list(self._outdated),
            gradients={
                name: parameter.grad.cpu()
                for name, parameter in unwrap(runner.model).named_parameters()
                if parameter.grad is not None
            },
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get('resuming', {})

    # How a run begins

    def before_run(self, runner: Runner) -> None:
        # mmengine would take what `last_checkpoint` says, whole or not.
        if get_start(runner) != (True, None):
            return
        found: list[Any] = [None, []]
        if is_main_process():
            folder = () if self.out_dir is None else (Path(self.out_dir) / Path(runner.work_dir).name,)
            found = list(find_resumable(runner.work_dir, *folder))
        broadcast_object_list(found)
        path, passed_over = found
        for line in passed_over:
            runner.logger.warning(f'Resuming: {line}; passed over')
        if path is None:
            broken = [line for line in passed_over if _BROKEN in line]
            if broken:
                raise CheckpointError(
                    f'{runner.work_dir}: no checkpoint there can be gone on from: {"; ".join(broken)}; remove them to '
                    'start from the beginning, or name another work dir'
                )
            runner.logger.info(f'Resuming: no checkpoint in {runner.work_dir}; training starts from the beginning')
        elif passed_over:
            runner.logger.warning(f'Resuming: from {path}')
        set_start(runner, path is not None, self.start_from if path is None else path)

    def before_train(self, runner: Runner) -> None:
        resumed = runner.iter > 0
        if resumed and runner.iter >= runner.max_iters:
            epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
            said = f'{runner.max_epochs} epochs' if epochs else f'{runner.max_iters} iterations'
            name = 'max_epochs' if epochs else 'max_iters'
            runner.logger.warning(
                f'All {said} of this run are over: there is nothing to go on with. train_cfg.{name} makes it longer.'
            )
        state, self._loaded = self._loaded if resumed else {}, {}
        hub = runner.message_hub
        moved = resumed and state.get('folder') is not None and not self._is_at(runner, state['folder'])
        if moved and 'keep_ckpt_ids' in hub.runtime_info:
            hub.update_info('keep_ckpt_ids', [])  # files of that name here are another run's
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.backend_args = dict(backend='whole')
            self.file_backend = WholeFileBackend()
            if is_main_process():
                _remove_partial(runner, {str(runner.work_dir), str(self.out_dir)})
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = self._here(self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = path and self._here(path)
        if not moved:
            self._outdated = list(state.get('outdated', ()))
            self._remove_outdated()
        self._position = 0
        self._resumed_position = _position(state, runner)
        self._validated = state.get('validated', -1)
        self._take_loader(runner, state.get('sampler_seed'))
        if not resumed:
            return
        self._saved = runner.epoch if self.by_epoch else runner.iter
        self.last_ckpt = hub.get_info('last_ckpt') if 'last_ckpt' in hub.runtime_info else None
        _restore_gradients(runner, state.get('gradients', {}))
        early = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
        for hook, (best_score, wait_count) in zip(early, state.get('early_stopping', ())):
            hook.best_score, hook.wait_count = best_score, wait_count
        if early and state.get('stopped'):
            runner.train_loop.stop_training = True
        if state and not self._resumed_position and self._validated != runner.iter and _validates_now(runner):
            runner.val_loop.run()

    def _is_at(self, runner: Runner, folder: str) -> bool:
        if self.out_dir is None:
            return _same_folder(folder, runner.work_dir)
        return _same_folder(folder, os.path.join(self.out_dir, os.path.basename(runner.work_dir.rstrip(os.sep))))

    def _here(self, path: str) -> str:
        """The file of that name in this run's folder, if there is one: the run may have been moved."""
        here = self.file_backend.join_path(self.out_dir, os.path.basename(path))
        return here if self.file_backend.exists(here) else path

    def _take_loader(self, runner: Runner, sampler_seed: int | None) -> None:
        loop = runner.train_loop
        loader = getattr(loop, 'dataloader', None)
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            runner.logger.warning('The training data have no batch sampler: resumed, they may come in another order')
            return
        sampler = _sampler(loader)
        if sampler_seed is not None and hasattr(sampler, 'seed'):
            sampler.seed = sampler_seed  # the sampler was made before the checkpoint's seed was known
        endless = isinstance(loop, IterBasedTrainLoop)
        if isinstance(loader.batch_sampler, ResumableBatches):  # train() for the second time
            self._batches = loader.batch_sampler
            self._batches.seed = runner.seed
        else:
            self._batches = ResumableBatches(loader.batch_sampler, runner.seed, endless)
            loop.dataloader = loader = _with_batches(loader, self._batches)
        if endless:
            loop.dataloader_iterator = _Endless(loader)

    # Training

    def before_train_epoch(self, runner: Runner) -> None:
        if self._batches is None:
            return
        if self._batches.endless:
            self._batches.skip = runner.iter
            return
        self._batches.epoch = runner.epoch
        self._batches.skip = start = self._resumed_position
        self._resumed_position = 0
        self._position = start
        if start and isinstance(runner.train_loop, EpochBasedTrainLoop):
            # The loop counts an epoch's steps from 0, and a hook cannot tell it where to begin.
            run_iter = runner.train_loop.run_iter
            runner.train_loop.run_iter = lambda number, data_batch: run_iter(start + number, data_batch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        _start_random(runner.seed, _STEP, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._batches is not None and not self._batches.endless:
            self._position = batch_idx + 1
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_train_epoch(self, runner: Runner) -> None:
        vars(runner.train_loop).pop('run_iter', None)
        self._position = 0
        super().after_train_epoch(runner)

    def after_val(self, runner: Runner) -> None:
        self._validated = runner.iter
        step = runner.epoch if self.by_epoch else runner.iter
        if self._saved is not None and self._saved == step:
            self.write_step(runner, step, dict(epoch=runner.epoch, iter=runner.iter))
        self._remove_outdated()

    # Files

    def write_best(self, runner: Runner, metrics: dict[str, Any]) -> None:
        if not hasattr(self, 'file_backend'):  # validation without training
            return
        for name in set(self.key_indicators) - {'auto', *metrics} if self.save_best else ():
            raise ConfigError(
                f'default_hooks.checkpoint.save_best={name}: validation gives no such metric, but {", ".join(metrics)}'
            )
        backend, last = self.file_backend, self.last_ckpt
        self.file_backend = _Keeper(backend, self.out_dir, self._outdated)
        self.last_ckpt = None  # it is not written again here but in `after_val`, when all hooks know of the metrics
        try:
            super().write_best(runner, metrics)
        finally:
            self.file_backend, self.last_ckpt = backend, last

    def write_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            with write_atomically(Path(runner.work_dir, 'last_checkpoint')) as partial:
                partial.write_text(self.last_ckpt)
        self._saved = step
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        best = getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()
        needed = {os.path.basename(path) for path in (self.last_ckpt, *best) if path}
        names, self._outdated = self._outdated, []
        for name in names if is_main_process() else ():
            path = self.file_backend.join_path(self.out_dir, name)
            if name in needed:
                continue
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                self.file_backend.rmtree(path)


def _with_batches(loader: DataLoader, batches: Sampler) -> DataLoader:
    """The same DataLoader with another batch sampler, which it takes only when it is made."""
    of_batches = {'batch_size', 'shuffle', 'sampler', 'drop_last', 'batch_sampler'}
    names = [name for name in inspect.signature(DataLoader).parameters if hasattr(loader, name)]
    return type(loader)(
        **{name: getattr(loader, name) for name in names if name not in of_batches}, batch_sampler=batches
    )


def _sampler(loader: DataLoader) -> Any:
    """The one that draws the indices: with a batch sampler of one's own, torch gives the loader another."""
    samplers = loader.sampler, getattr(loader.batch_sampler, 'sampler', None)
    return next((sampler for sampler in samplers if hasattr(sampler, 'seed')), None)


def _position(state: Mapping[str, Any], runner: Runner) -> int:
    """How many batches of the epoch are behind a resumed run, in batches of its own."""
    position, batches = state.get('position', 0), state.get('batches', 0)
    return position * len(runner.train_dataloader) // batches if position else 0


def _validates_now(runner: Runner) -> bool:
    """Whether the training loop would have validated where a run is resumed, at the end of an epoch or iteration."""
    loop = runner.train_loop
    if runner.val_loop is None or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return False
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, done + 1) - 1]
    return done >= loop.val_begin and (done % interval == 0 or done == last)


def _restore_gradients(runner: Runner, gradients: Mapping[str, torch.Tensor]) -> None:
    if gradients and get_dist_info()[1] > 1:
        runner.logger.warning('Resuming: the gradients accumulated so far, each process had its own, are lost')
        return
    for name, parameter in unwrap(runner.model).named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)


def _remove_partial(runner: Runner, folders: set[str]) -> None:
    for path in (path for folder in folders for path in Path(folder).glob('.*.part')):
        shutil.rmtree(path, ignore_errors=True)
        runner.logger.info(f'Removed {path}, half of a file: its writing was interrupted')


def make_resumable(cfg: Config, start_from: str | None = None) -> Config:
    """A runner's config whose ``CheckpointHook``, also the one mmengine adds, is :class:`ResumableCheckpointHook`."""
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = ConfigDict()  # of which Config makes its own
    # mmengine's own default; an explicit None is for no checkpoints.
    hook = cfg.default_hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook', interval=1))
    if isinstance(hook, dict) and hook.get('type') in ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook):
        hook.type = ResumableCheckpointHook.__name__
    if start_from is not None and isinstance(hook, dict) and hook.get('type') == ResumableCheckpointHook.__name__:
        hook.start_from = start_from
    return cfg
