"""Runs Python as ``python`` does, each time as if in an interpreter of its own, which has imported what is slow to.

``python snippets.py MODULES < JSON`` forks a process for every line of JSON, ``{'words': ['-c', 'print(1)'],
'folder': ..., 'environment': ...}``, in which nothing but MODULES (comma-separated, and what they import) is imported
yet, and answers with a line ``{'status': ..., 'stdout': ..., 'stderr': ...}`` each. Variables that torch or a Hub
client read when they are imported are those of the server.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Interpreter:
    """``interpreter('-c', code, *arguments)`` or ``interpreter(script, *arguments)``, as after ``python``."""

    def __init__(self, modules: str, environment: dict[str, str]):
        words = [sys.executable, __file__, modules]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._server = subprocess.Popen(words, **pipes)
        imported = json.loads(self._server.stdout.readline())
        assert 'torch' in imported
        assert 'sk_plugins' not in imported

    def __call__(self, *words, cwd=None, env=None) -> subprocess.CompletedProcess:
        words = [str(word) for word in words]
        environment = dict(os.environ if env is None else env)
        folder = os.getcwd() if cwd is None else str(cwd)
        line = json.dumps(dict(words=words, folder=folder, environment=environment))
        self._server.stdin.write(line + '\n')
        self._server.stdin.flush()
        done = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess(['python', *words], done['status'], done['stdout'], done['stderr'])

    def close(self):
        self._server.communicate()


def serve(words: list[str], folder: str, environment: dict[str, str]) -> dict:
    with (
        tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as out,
        tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as err,
        open(os.devnull) as nothing,
    ):
        child = os.fork()
        if not child:
            status = 1
            try:
                for file, number in ((nothing, 0), (out, 1), (err, 2)):
                    os.dup2(file.fileno(), number)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                execute(words)
                status = 0
            except SystemExit as error:
                status = error.code
                if not isinstance(status, int):
                    if status is not None:
                        print(status, file=sys.stderr)
                    status = int(status is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return {'status': status, 'stdout': out.read(), 'stderr': err.read()}


def execute(words: list[str]):
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    script, *arguments = words
    if script == '-c':
        code, *arguments = arguments
        sys.argv = ['-c', *arguments]
        sys.path[0] = ''
        exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
    else:
        sys.argv = words
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    sys.path[0] = ''  # not the helpers
    for name in sys.argv[1].split(','):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):  # as in tests/conftest.py
        from yapf.yapflib import yapf_api

        yapf_api.FormatCode = lambda text, **settings: (text, False)
    gc.freeze()
    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)
