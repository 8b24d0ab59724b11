# The same small SKNet on Fashion-MNIST at 28x28: 20 epochs for a GPU; a few already tell on a CPU.
_base_ = [
    '_base_/models/sknet_small.py',
    '_base_/datasets/fashion_mnist_bs128.py',
    '_base_/schedules/cosine_20e.py',
    '_base_/default_runtime.py',
]

auto_scale_lr = dict(base_batch_size=128)
