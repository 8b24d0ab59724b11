# Table 5.
_base_ = [
    '_base_/models/sknet29_cifar.py',
    '_base_/datasets/cifar10_bs128.py',
    '_base_/schedules/cifar_bs128.py',
    '_base_/default_runtime.py',
]
