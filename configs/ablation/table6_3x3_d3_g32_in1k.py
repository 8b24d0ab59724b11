_base_ = '../sknet50_in1k.py'

model = dict(backbone=dict(sk_kwargs=dict(branches=[(3, 1, 32), (3, 3, 32)])))
