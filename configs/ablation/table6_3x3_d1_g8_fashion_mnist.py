_base_ = '../sknet_fashion_mnist.py'

model = dict(backbone=dict(sk_kwargs=dict(branches=[(3, 1, 8), (3, 1, 8)])))
