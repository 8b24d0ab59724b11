_base_ = '../sknet50_in1k.py'

model = dict(backbone=dict(sk_kwargs=dict(kernel_sizes=(3, 5))))
