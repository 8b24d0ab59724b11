_base_ = './sknet29_16x32d_cifar10.py'

model = dict(backbone=dict(unit='plain'))
