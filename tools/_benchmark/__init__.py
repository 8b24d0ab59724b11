"""Parts of tools/benchmark.py and tools/benchmark_detection.py.

Imports run downward: ``settings`` (what a run is), ``models`` (what is built), ``machine`` (where), ``counting`` and
``measuring`` (the figures), ``sets`` (which figures, and their goals), ``choosing`` (what the command line asks for),
``reporting``, ``readme`` and ``drawing`` (the outcome).
"""
