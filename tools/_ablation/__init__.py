"""Parts of tools/run_ablation.py and tools/compare_warm_start.py.

Imports run downward: ``rows`` and ``networks`` (what is run), ``data``, ``measuring``, ``attention`` and ``together``,
``training`` (runs of one network), ``claims`` and ``deciding`` (what the rows say), ``running`` (all of them) and
``timing``, ``drawing`` and ``reporting``; ``warm`` is the second tool's.
"""
