# SimCLR's linear evaluation (https://github.com/google-research/simclr): SGD with Nesterov momentum, batch 4096,
# 90 epochs, lr 0.1 * 4096 / 256 along a cosine.
max_epochs = 90

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=1.6, momentum=0.9, weight_decay=1e-6, nesterov=True),
)
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True, end=max_epochs, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=4096)
