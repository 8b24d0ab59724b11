"""Parts of tools/run_ablation.py and tools/compare_warm_start.py.

Imports run downward: ``networks`` (what is compared), ``data`` and ``rows`` (what goes in and what comes out),
``training`` (one run), ``attention`` and ``running`` (all of them), ``comparing``, ``drawing`` and ``reporting``;
``warm`` is the second tool's.
"""
