_base_ = '../sknet_fashion_mnist.py'

model = dict(backbone=dict(sk_kwargs=dict(kernel_sizes=(3, 7))))
