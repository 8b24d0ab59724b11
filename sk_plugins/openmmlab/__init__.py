"""What OpenMMLab's door, :mod:`sk_plugins.mmpretrain_models`, needs: it imports the rooms that it registers."""
