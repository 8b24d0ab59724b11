# CIFAR-10's, with its own pixels' mean and deviation.
_base_ = './cifar10_bs128.py'

data_preprocessor = dict(num_classes=100, mean=[129.30, 124.07, 112.43], std=[68.17, 65.39, 70.42])

train_dataloader = dict(dataset=dict(type='CIFAR100', data_root='data/cifar100'))
val_dataloader = dict(dataset=dict(type='CIFAR100', data_root='data/cifar100'))
test_dataloader = val_dataloader
