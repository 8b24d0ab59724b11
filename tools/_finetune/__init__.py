"""Training on one's own images, in parts: tools/finetune.py is its command line.

data: what a folder or a list holds, and the split; checking: what would go wrong in the run; settings: what is chosen
for it; configs: the mmengine config; training: the run; reporting: how good it is and where it errs; exporting: a
folder for the Hub.
"""
