"""What the selection does: a record of every SK unit's attention, its numbers over a folder of images, and figures.

The figures, in :mod:`sk_plugins.analysis.figures`, need matplotlib; nothing else here does.
"""

from .images import ImageStream, enlarge
from .recording import Recording, SKUnit, record, sk_units
from .study import AttentionStudy, receptive_field, study
from .training import attention_scalars, log_attention

__all__ = [
    'AttentionStudy',
    'ImageStream',
    'Recording',
    'SKUnit',
    'attention_scalars',
    'enlarge',
    'log_attention',
    'receptive_field',
    'record',
    'sk_units',
    'study',
]
