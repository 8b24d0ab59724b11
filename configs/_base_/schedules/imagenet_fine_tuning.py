# SimCLRv2's fine-tuning of SK networks (arXiv:2006.10029): LARS, batch 1024, 30 epochs, lr 0.002 * sqrt(1024) along a
# cosine, no weight decay; norms, biases and the classifier have the learning rate as it is.
max_epochs = 30

_as_it_is = dict(lars_exclude=True)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='LARS', lr=0.064, momentum=0.9, weight_decay=0.0),
    paramwise_cfg=dict(
        custom_keys={
            'bn': _as_it_is,
            'backbone.conv1.1': _as_it_is,
            'backbone.conv1.4': _as_it_is,
            'downsample.2': _as_it_is,
            'head.fc': _as_it_is,
        }
    ),
)
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True, end=max_epochs, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)
