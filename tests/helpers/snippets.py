"""Runs Python snippets, each as if in an interpreter of its own, and imports what they are slow to import once.

``python snippets.py MODULES < JSON``: forks a process for every ``{'code': ..., 'folder': ...}`` of a
line of JSON, in which nothing but MODULES (comma-separated, and what they import) is imported yet, and answers with a
line ``{'status': ..., 'output': ...}`` each.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback


def run(code: str, folder: str) -> dict:
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as output:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(folder)
                exec(compile(code, 'snippet', 'exec'), {'__name__': '__main__'})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return {'status': status, 'output': output.read()}


if __name__ == '__main__':
    sys.path[0] = ''  # the folder that a snippet runs in, as with `python -c`
    for name in sys.argv[1].split(','):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
