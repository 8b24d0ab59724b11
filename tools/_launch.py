"""torchrun, of which one line is left where a process fails: which one, and how. For dist_train.sh and dist_test.sh."""

import logging
import sys
from pathlib import Path

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run


def describe(rank: int, failure: ProcessFailure) -> str:
    process = f'process {rank} (pid {failure.pid})'
    if failure.exitcode < 0:
        return f'{process} was killed by signal {-failure.exitcode} ({failure.signal_name()})'
    return f'{process} ended with status {failure.exitcode}, for the reason that it gave above'


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # With restarts left, torchrun goes on after the line in which it names the process.
    level = logging.ERROR if args.max_restarts else logging.CRITICAL
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(level)
    try:
        run(args)
    except ChildFailedError as error:
        restarts = f', after {args.max_restarts} restarts' if args.max_restarts else ''
        message = f'{describe(*error.get_first_failure())}; the other processes were stopped{restarts}'
    except DistNetworkError as error:
        message = f'--master-addr={args.master_addr} --master-port={args.master_port}: {str(error).splitlines()[0]}'
    else:
        return
    print(f'{Path(args.training_script).name}: error: {message}', file=sys.stderr)
    raise SystemExit(1)


if __name__ == '__main__':
    main()
