# The small network without SK: 0.99M parameters, 45.5 MFLOPs. With SK it has 1.28M and 53.4.
_base_ = '../sknet_fashion_mnist.py'

model = dict(backbone=dict(unit='plain'))
