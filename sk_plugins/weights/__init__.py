"""Weights: files, their names in timm and OpenMMLab, other projects' networks, and the Hugging Face Hub."""
