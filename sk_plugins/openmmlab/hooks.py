"""mmengine's hooks of this project."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..analysis import Recording, attention_scalars, record

__all__ = ['PictureHook', 'SKAttentionHook']


@HOOKS.register_module()
class SKAttentionHook(Hook):
    """Each SK unit's mean attention and its entropy in training, to the visualizer: to TensorBoard, files, ...

    ``custom_hooks = [dict(type='SKAttentionHook', interval=100)]`` writes
    :func:`~sk_plugins.analysis.attention_scalars` of the training batch, that of the first process where there are
    several; between, nothing is recorded.

    Args:
        interval: iterations from one record to the next.
        units: names of the units (``('SK_2_3', 'SK_5_3')``); all where None.

    Raises:
        ValueError: an ``interval`` below 1; and before training, a model without SK units or an unknown unit.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 50, units: Sequence[str] | None = None) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval={interval!r} must be an integer of at least 1')
        self.interval = interval
        self.units = units
        self._recording: Recording | None = None

    def before_train(self, runner: Runner) -> None:
        record(runner.model, self.units)  # its errors, now

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._recording = record(runner.model, self.units).__enter__()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__()
            scalars = attention_scalars(recording)
            if scalars:
                runner.visualizer.add_scalars(scalars, step=runner.iter + 1)


@HOOKS.register_module()
class PictureHook(Hook):
    """In testing a classifier, every picture with its labels, under the name and in the folder that it has.

    mmpretrain's ``VisualizationHook`` names files by their last part alone: pictures of one name in two classes
    overwrite each other.

    Args:
        out_dir: where they go, as PNG; of data without files, by their number.
    """

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir)
        self._count = 0
        self._taken: set[Path] = set()

    def before_test(self, runner: Runner) -> None:
        self._count, self._taken = 0, set()

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        top = getattr(runner.test_dataloader.dataset, 'img_prefix', '')
        bgr = _reads_bgr(runner)
        for image, sample in zip(data_batch['inputs'], outputs or ()):
            path = self.out_dir / self._name(sample.get('img_path'), top)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = image.permute(1, 2, 0).cpu().numpy().astype('uint8')
            if bgr and pixels.shape[2] == 3:
                pixels = pixels[..., ::-1].copy()
            runner.visualizer.visualize_cls(pixels, sample, name=path.stem, out_file=str(path))
            self._count += 1

    def _name(self, picture: str | None, top: str) -> Path:
        if picture is None:
            return Path(f'{self._count:06d}.png')
        inside = os.path.relpath(picture, top) if top else os.path.basename(picture)
        kept = Path(os.path.basename(picture) if inside.startswith('..') else inside)
        name = kept.with_suffix('.png')
        if name in self._taken:  # another ending
            name = kept.with_name(f'{kept.name}.png')
        self._taken.add(name)
        return name


def _reads_bgr(runner: Runner) -> bool:
    """Whether the inputs are B, G, R: what the preprocessor turns into RGB is."""
    model = runner.model
    while hasattr(model, 'module'):  # of several processes, or of test-time augmentation
        model = model.module
    preprocessor = getattr(model, 'data_preprocessor', None)
    if hasattr(preprocessor, 'to_rgb'):
        return bool(preprocessor.to_rgb)
    return bool((runner.cfg.get('data_preprocessor') or {}).get('bgr_to_rgb'))
