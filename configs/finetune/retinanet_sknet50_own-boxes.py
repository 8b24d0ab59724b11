# RetinaNet on SKNet-50, fine-tuned on one GPU on boxes of one's own in COCO's format: docs/own_boxes_and_masks.md.
_base_ = '../detection/retinanet_sknet50_fpn_1x_coco.py'

data_root = '{{$DATA:data/own}}/'
classes = tuple(
    category['name']
    for category in __import__('json').loads(
        __import__('pathlib').Path(data_root, 'annotations/train.json').read_text(encoding='utf-8')
    )['categories']
)
batch_size, epochs = 4, 12

model = dict(bbox_head=dict(num_classes=len(classes)))
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}annotations/val.json')
test_evaluator = val_evaluator

# The recipe's 0.01 is for 16 images a step.
optim_wrapper = dict(optimizer=dict(lr=0.01 * batch_size / 16), clip_grad=dict(max_norm=10.0))
auto_scale_lr = dict(base_batch_size=batch_size)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=epochs, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'), logger=dict(interval=10))
