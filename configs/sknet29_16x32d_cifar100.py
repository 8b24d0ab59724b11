# Table 5.
_base_ = [
    '_base_/models/sknet29_cifar.py',
    '_base_/datasets/cifar100_bs128.py',
    '_base_/schedules/cifar_bs128.py',
    '_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=100))
