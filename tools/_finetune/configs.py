"""The run as an ordinary config of mmengine's, and the lists of images that it reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from sk_plugins._files import write_atomically

from .data import ImageSet, Item
from .settings import Network, Recipe

__all__ = ['MONITOR', 'build_config', 'write_lists']

# By whether there are several labels an image.
MONITOR = {False: 'accuracy/top1', True: 'multi-label/mAP'}


def write_lists(images: ImageSet, folder: Path) -> tuple[Path, Path]:
    """Which image is in which split, with its label: ``train`` and ``val``, in the form that mmpretrain reads.

    One label an image goes into a text file, ``PATH NUMBER`` a line; several into JSON.
    """
    numbers = {name: i for i, name in enumerate(images.classes)}

    def write(name: str, items: Sequence[Item]) -> Path:
        path = folder / f'{name}.{"json" if images.multi_label else "txt"}'
        with write_atomically(path) as partial:
            if images.multi_label:
                data = [dict(img_path=item.path, gt_label=[numbers[label] for label in item.labels]) for item in items]
                text = json.dumps(dict(metainfo=dict(classes=images.classes), data_list=data), indent=1)
            else:
                text = ''.join(f'{item.path} {numbers[item.labels[0]]}\n' for item in items)
            partial.write_text(text, encoding='utf-8')
        return path

    return write('train', images.train), write('val', images.val)


def build_config(
    images: ImageSet, network: Network, recipe: Recipe, lists: tuple[Path, Path], work_dir: Path, seed: int = 0
) -> Config:
    """The config that ``tools/train.py`` and ``tools/test.py`` take."""
    several, classes = images.multi_label, len(images.classes)
    backbone = dict(network.backbone)
    if network.source is not None:
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=network.source)
    head: dict[str, Any] = dict(type='MultiLabelLinearClsHead', num_classes=classes, in_channels=network.features)
    if not several:
        head.update(
            type='LinearClsHead',
            loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
            topk=recipe.topk,
        )
    preprocessor: dict[str, Any] = dict(num_classes=classes, mean=list(recipe.mean), std=list(recipe.std), to_rgb=True)
    if several:
        preprocessor['to_onehot'] = True

    def resizing(type_: str, scale: int, **kwargs) -> dict[str, Any]:
        return dict(type=type_, scale=scale, **kwargs, backend='pillow', interpolation=recipe.interpolation)

    flip = [dict(type='RandomFlip', prob=0.5, direction='horizontal')] if recipe.flip else []
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
    train_pipeline = [load, resizing('RandomResizedCrop', recipe.size, crop_ratio_range=(0.35, 1.0)), *flip, pack]
    test_pipeline = [load, resizing('ResizeEdge', recipe.resize, edge='short')]
    test_pipeline += [dict(type='CenterCrop', crop_size=recipe.size), pack]

    def loader(path: Path, items: Sequence[Item], pipeline: list[dict], training: bool) -> dict[str, Any]:
        return dict(
            batch_size=recipe.batch,
            num_workers=recipe.workers,
            persistent_workers=recipe.workers > 0,
            pin_memory=recipe.device != 'cpu',
            # The attention's BatchNorm needs two images in training.
            drop_last=training and len(items) % recipe.batch == 1,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=training),
            dataset=dict(
                type='MultiLabelDataset' if several else 'CustomDataset',
                data_root=str(images.root.resolve()),
                ann_file=str(path.resolve()),
                metainfo=dict(classes=list(images.classes)),
                pipeline=pipeline,
            ),
        )

    evaluator = [dict(type='Accuracy', topk=recipe.topk)]
    if several:
        evaluator = [dict(type='AveragePrecision'), dict(type='MultiLabelMetric', thr=0.5)]
    wrapper: dict[str, Any] = dict(
        type='AmpOptimWrapper' if recipe.amp else 'OptimWrapper',
        optimizer=dict(type='AdamW', lr=recipe.lr, weight_decay=recipe.weight_decay),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
        clip_grad=dict(max_norm=5.0),
    )
    if recipe.amp:
        wrapper['loss_scale'] = 'dynamic'
    if recipe.layer_decay < 1:
        wrapper['constructor'] = 'LearningRateDecayOptimWrapperConstructor'
        wrapper['paramwise_cfg']['layer_decay_rate'] = recipe.layer_decay
    warm_up = max(1, recipe.epochs // 10)
    schedule = [dict(type='LinearLR', start_factor=0.05, by_epoch=True, end=warm_up, convert_to_iter_based=True)]
    if recipe.epochs > warm_up:
        schedule.append(
            dict(
                type='CosineAnnealingLR',
                by_epoch=True,
                begin=warm_up,
                end=recipe.epochs,
                eta_min_ratio=0.01,
                convert_to_iter_based=True,
            )
        )
    hooks: dict[str, Any] = dict(
        logger=dict(type='LoggerHook', interval=10),
        # Of equal scores the later: they are many where few images are held out, and the first are chance's.
        checkpoint=dict(
            type='ResumableCheckpointHook',
            interval=1,
            max_keep_ckpts=1,
            save_best=MONITOR[several],
            rule='greater',
            ties_to_last=True,
        ),
        visualization=dict(type='VisualizationHook', enable=False),
    )
    stopping = dict(
        type='EarlyStoppingHook', monitor=MONITOR[several], rule='greater', min_delta=0.0, patience=recipe.patience
    )
    val = loader(lists[1], images.val, test_pipeline, training=False)
    return Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(
                imports=['sk_plugins.mmpretrain_models', 'sk_plugins.openmmlab.runtime'], allow_failed_imports=False
            ),
            work_dir=str(work_dir),
            model=dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head),
            data_preprocessor=preprocessor,
            train_dataloader=loader(lists[0], images.train, train_pipeline, training=True),
            val_dataloader=val,
            test_dataloader=val,
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            optim_wrapper=wrapper,
            param_scheduler=schedule,
            train_cfg=dict(by_epoch=True, max_epochs=recipe.epochs, val_interval=1),
            val_cfg=dict(),
            test_cfg=dict(),
            auto_scale_lr=dict(base_batch_size=recipe.batch),
            default_hooks=hooks,
            custom_hooks=[stopping],
            env_cfg=dict(
                cudnn_benchmark=True,
                mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
                dist_cfg=dict(backend='nccl'),
            ),
            visualizer=dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
            log_level='INFO',
            randomness=dict(seed=seed),
        )
    )
