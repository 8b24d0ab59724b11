"""OpenMMLab's side: what :mod:`sk_plugins.mmpretrain_models` registers, and :mod:`.runtime`, which it does not import.

Backbones, data sets and hooks are the former. The runtime is for training that survives; tools and configs import it.
"""
