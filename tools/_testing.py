"""What the options of test.py change in a config, whichever framework's it is."""

from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, ConfigDict

from sk_plugins.openmmlab import hooks  # noqa: F401 - registers PictureHook

# How mmdet and mmpretrain merge the predictions of augmented copies where the config does not say.
TTA_MODELS = {
    'mmdet': dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    'mmpretrain': dict(type='mmpretrain.AverageClsScoreTTA'),
}
# Short side before the centre crop: 256 for 224 and 352 for 320, as the paper tests.
RESIZE_FOR_CROP = {224: 256, 320: 352}


def set_out(cfg: Config, out: Path) -> None:
    """Check the suffix of ``--out``, and set what mmseg needs to write its label maps.

    Raises:
        ValueError: another suffix than the config's kind of predictions has.
    """
    if out.suffix == '.json':
        return
    if cfg.get('default_scope') != 'mmseg':
        if out.suffix != '.pkl':
            raise ValueError(f'--out {out} must end in .json (metrics) or .pkl (predictions)')
    elif out.suffix:
        raise ValueError(f'--out {out} must end in .json (metrics) or be a folder (label maps)')
    else:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=str(out), keep_results=True)


def set_show_dir(cfg: Config, folder: Path, tta: bool) -> None:
    """Have every test image drawn, by the framework's visualisation hook or, of mmpretrain's, by this project's.

    Raises:
        ValueError: there is no such hook, or it cannot draw augmented copies.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(f'--show-dir {folder}: the config has no default_hooks.visualization')
    where = str(folder.resolve())  # mmdet takes another path as one below the work dir, again for every batch
    if cfg.get('default_scope') in ('mmdet', 'mmrotate'):
        hook.update(draw=True, test_out_dir=where)
    elif cfg.get('default_scope') == 'mmseg':
        hook.draw = True
        cfg.visualizer.save_dir = where
    elif tta:
        raise ValueError(f'--show-dir {folder}: with --tta, mmpretrain does not draw')
    else:
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='PictureHook', out_dir=where)]


def set_tta(cfg: Config) -> None:
    """Test on the config's ``tta_pipeline`` with its ``tta_model``; by default, on each image and its mirror image.

    Raises:
        ValueError: the config says neither and there is no default for it.
    """
    scope = cfg.get('default_scope') or 'mmpretrain'
    heads = {**cfg.model, **cfg.model.get('roi_head', {})}
    if 'tta_model' not in cfg:
        if scope not in TTA_MODELS:
            raise ValueError(f'--tta: the config says no tta_model, and there is no default for {scope}')
        if scope == 'mmdet' and heads.get('mask_head') is not None:
            raise ValueError('--tta: mmdet merges boxes only, and the model predicts masks')
        cfg.tta_model = ConfigDict(TTA_MODELS[scope])
    if 'tta_pipeline' not in cfg:
        if scope not in TTA_MODELS:
            raise ValueError(f'--tta: the config says no tta_pipeline, and there is no default for {scope}')
        *transforms, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        if scope == 'mmdet':
            pack.meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def set_crop(pipeline: list[dict], crop: int) -> None:
    """Set the short side and the centre crop of a test pipeline, in place.

    Raises:
        ValueError: the pipeline has no ``ResizeEdge`` or no ``CenterCrop``.
    """
    transforms = {transform['type']: transform for transform in pipeline}
    missing = [name for name in ('ResizeEdge', 'CenterCrop') if name not in transforms]
    if missing:
        raise ValueError(f'--crop {crop}: the test pipeline has no {" and no ".join(missing)} to set')
    transforms['ResizeEdge']['scale'] = RESIZE_FOR_CROP[crop]
    transforms['CenterCrop']['crop_size'] = crop
