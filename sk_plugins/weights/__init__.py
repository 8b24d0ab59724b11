"""Weights: files, names in timm and OpenMMLab, other projects' networks, warm starts, and the Hugging Face Hub."""

from .convert import load_third_party, recognise_third_party
from .files import CheckpointError, HubError, load_checkpoint, save_state_dict
from .hub import PartialLoad, load_partial, save_hub_folder
from .names import save_mmengine_checkpoint, timm_arguments, to_mmpretrain, to_timm
from .warm import from_resnet, warm_start

__all__ = [
    'CheckpointError',
    'HubError',
    'PartialLoad',
    'from_resnet',
    'load_checkpoint',
    'load_partial',
    'load_third_party',
    'recognise_third_party',
    'save_hub_folder',
    'save_mmengine_checkpoint',
    'save_state_dict',
    'timm_arguments',
    'to_mmpretrain',
    'to_timm',
    'warm_start',
]
