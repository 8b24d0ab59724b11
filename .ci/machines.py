"""The numeric tests under the settings that make one machine several: instruction sets and threads.

    python .ci/machines.py            # every setting that differs here: most of an hour on two cores
    python .ci/machines.py --write    # and the results into CONTRIBUTING.md

ATEN_CPU_CAPABILITY chooses the instructions of torch's own kernels (default, avx2; unset: the best there is), and
ONEDNN_MAX_CPU_ISA those of the convolutions and matrix products of oneDNN (SSE41, AVX2, AVX512_CORE; unset: the best).
Where the machine has no AVX-512, unset is AVX2, and AVX512_CORE too: these are not run twice. Each setting runs on one
thread and on two; with AVX-512, which has twelve settings, on one and on two in turns.
"""

import argparse
import os
import subprocess
import sys

from tables import Counts, run_tests, table, write

# The tests that compare floats; what compilers and exporters make of a network costs most and is no machine's.
TESTS = ('tests/ops', 'tests/layers', 'tests/networks', 'tests/timm_models', 'tests/fuse')
CHOSEN = (
    'not compile and not export and not onnx and not meta and not save_for_hf and not published and not shufflenet_file'
)
HEAD = ('ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA', 'threads', 'passed', 'failed', 'skipped', 'time')
CAPABILITY = 'import torch; print(torch.backends.cpu.get_cpu_capability())'


def settings() -> list[tuple[str | None, str | None, int]]:
    """ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and threads, of runs that differ on this machine."""
    environment = {name: value for name, value in os.environ.items() if name != 'ATEN_CPU_CAPABILITY'}
    best = subprocess.run([sys.executable, '-c', CAPABILITY], env=environment, capture_output=True, text=True).stdout
    if 'AVX512' in best:
        pairs = [(a, o) for a in ('default', 'avx2', None) for o in ('SSE41', 'AVX2', 'AVX512_CORE', None)]
        return [(a, o, 1 + (i + i // 4) % 2) for i, (a, o) in enumerate(pairs)]
    return [(a, o, threads) for a in ('default', None) for o in ('SSE41', None) for threads in (1, 2)]


def run(aten: str | None, onednn: str | None, threads: int) -> Counts:
    environment = {'ATEN_CPU_CAPABILITY': aten, 'ONEDNN_MAX_CPU_ISA': onednn, 'OMP_NUM_THREADS': str(threads)}
    # As many processes as leave every thread a core.
    jobs = min(8, max(1, (os.cpu_count() or 1) // threads))
    return run_tests(sys.executable, ['-n', str(jobs), '--dist', 'loadfile', '-k', CHOSEN, *TESTS], environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write the table into CONTRIBUTING.md')
    args = parser.parse_args()
    lines, ok = [], True
    for aten, onednn, threads in settings():
        print(f'== ATEN_CPU_CAPABILITY={aten} ONEDNN_MAX_CPU_ISA={onednn}, {threads} thread(s)', flush=True)
        counts = run(aten, onednn, threads)
        ok = ok and counts.ok
        lines.append((aten or 'unset', onednn or 'unset', str(threads), *counts.cells()))
        if args.write:  # what there is, lest an hour be lost
            write('machines', table(HEAD, lines))
    print(f'\n{table(HEAD, lines)}')
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
