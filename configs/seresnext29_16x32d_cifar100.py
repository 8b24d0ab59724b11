_base_ = './sknet29_16x32d_cifar100.py'

model = dict(backbone=dict(unit='se'))
