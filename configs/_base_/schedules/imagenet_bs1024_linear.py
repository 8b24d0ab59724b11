# ShuffleNetV2's (arXiv:1807.11164), with the SKNet paper's weight decay for lightweight networks: SGD, batch 1024,
# 240 epochs (300,000 iterations), lr 0.5 falling linearly to 0; no weight decay on BatchNorm and biases.
max_epochs = 240

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.5, momentum=0.9, weight_decay=4e-5),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=True, end=max_epochs, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)
