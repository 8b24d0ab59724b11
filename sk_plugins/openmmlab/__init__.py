"""What :mod:`sk_plugins.mmpretrain_models` needs: backbones, datasets, hooks and the training runtime."""
