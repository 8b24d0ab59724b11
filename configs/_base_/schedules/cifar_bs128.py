# ResNeXt's on CIFAR (arXiv:1611.05431, Sec. 5.3; Nesterov momentum from its published code): SGD, batch 128,
# 300 epochs, lr 0.1 divided by 10 at 150 and 225; weight decay 5e-4 on all parameters.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
)
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[150, 225], gamma=0.1)

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=128)
