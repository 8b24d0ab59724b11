"""timm's private names, each with what stands in for it in a release that lacks it."""

from collections.abc import Sequence

__all__ = ['FEATURE_NETS', 'feature_take_indices']

# The wrappers of features_only, and the method of each that calls the modules.
FEATURE_NETS = (
    ('timm.models._features.FeatureDictNet', '_collect'),
    ('timm.models._features.FeatureHookNet', 'forward'),
)


def _feature_take_indices(num_features: int, indices: int | Sequence[int] | None = None) -> tuple[list[int], int]:
    """Which of so many feature maps to take, and the last of them: ``indices`` names them, or how many of the last."""
    if indices is None:
        indices = num_features
    if isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f'last-n ({indices}) is out of range (1 to {num_features})')
        indices = range(num_features - indices, num_features)
    take = [i + num_features if i < 0 else i for i in indices]
    if not all(0 <= i < num_features for i in take):
        raise ValueError(f'feature index in {list(indices)} is out of range (0 to {num_features - 1})')
    return take, max(take)


try:  # no public module exports it
    from timm.models._features import feature_take_indices
except ImportError:
    feature_take_indices = _feature_take_indices
