"""A loopback Hugging Face Hub: repositories from a dict, and the faults that a real one and the network have."""

import hashlib
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

_PATH = re.compile(r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)')
_RANGE = re.compile(r'bytes=(\d+)-')


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a status in place of the answer, or a body that is not the file's."""

    status: int | None = None
    code: str | None = None  # X-Error-Code, by which the client tells the reasons for a status apart
    message: str | None = None
    methods: tuple[str, ...] = ('HEAD', 'GET')
    cut: float | None = None  # the share of the body that is sent before the connection closes
    announce_cut: bool = False  # with a Content-Length of the part, as a proxy with a damaged copy does
    garbage: bool = False  # as many bytes as the file has, but others
    flipped: bool = False  # the file but for its last byte
    pause: float = 0  # seconds in the middle of the body
    once: bool = False  # over after one GET


# Status, code and message as huggingface.co sends them: 401 to a client that is not logged in, 403 and 404 to others.
FAULTS = {
    'missing': Fault(404, 'RepoNotFound', 'Repository not found'),
    'unauthorized': Fault(401, 'RepoNotFound', 'Invalid username or password.'),
    'bad-token': Fault(401, None, 'Invalid credentials in Authorization header'),
    'gated': Fault(403, 'GatedRepo', 'Access to this model is restricted and you are not in the authorized list.'),
    'disabled': Fault(403, None, 'Access to this resource is disabled.'),
    'busy': Fault(429, None, 'Too many requests: slow down'),
    'down': Fault(500, None, 'Internal Error - We are working hard to fix this as soon as possible!'),
    'download-down': Fault(500, methods=('GET',)),
    'truncated': Fault(cut=0.5),
    'short': Fault(cut=0.5, announce_cut=True),
    'garbage': Fault(garbage=True),
    'flipped': Fault(flipped=True),
}


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class HubServer:
    """Serves ``/OWNER/NAME/resolve/REVISION/FILE`` on 127.0.0.1; a stopped one refuses connections on its port.

    Attributes:
        faults: a :class:`Fault` by 'OWNER/NAME/FILE', 'OWNER/NAME' or '*' for all, the first that is there.
        requests: every request so far.
    """

    def __init__(self) -> None:
        self.port = 0
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self._revisions: dict[str, dict[str, str]] = {}
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def add(self, repo: str, files: Mapping[str, bytes], *revisions: str) -> str:
        """Commit ``files`` as the whole of a repository, on branch main or on ``revisions``; returns the commit."""
        listing = '\n'.join(f'{name} {hashlib.sha1(data).hexdigest()}' for name, data in sorted(files.items()))
        commit = hashlib.sha1(f'{repo}\n{listing}'.encode()).hexdigest()
        self._commits[repo, commit] = dict(files)
        self._revisions.setdefault(repo, {}).update(dict.fromkeys([*(revisions or ('main',)), commit], commit))
        return commit

    def start(self) -> 'HubServer':
        self._server = ThreadingHTTPServer(('127.0.0.1', self.port), _Handler)
        self._server.hub = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fault(self, repo: str, name: str) -> Fault:
        return next((self.faults[key] for key in (f'{repo}/{name}', repo, '*') if key in self.faults), Fault())

    def find(self, repo: str, revision: str, name: str) -> tuple[str | None, bytes | Fault]:
        """The commit and the file, or what is wrong with the request."""
        if repo not in self._revisions:
            return None, FAULTS['missing']
        commit = self._revisions[repo].get(revision)
        if commit is None:
            return None, Fault(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit, self._commits[repo, commit].get(name, Fault(404, 'EntryNotFound', 'Entry not found'))


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 closes the connection after each answer, so that nothing is served once the server has stopped.
    protocol_version = 'HTTP/1.0'

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub
        hub.requests.append(Request(self.command, self.path, self.headers.get('Range')))
        match = _PATH.fullmatch(self.path)
        if match is None:
            self._answer(404, {'Content-Length': 0})
            return
        repo, revision, name = map(unquote, match.groups())
        fault = hub.fault(repo, name)
        if fault.once and self.command == 'GET':
            hub.faults = {key: other for key, other in hub.faults.items() if other is not fault}
        if fault.status is not None and self.command in fault.methods:
            self._refuse(fault)
            return
        commit, found = hub.find(repo, revision, name)
        if isinstance(found, Fault):
            self._refuse(found, commit)
        else:
            self._send(commit, found, fault)

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self, fault: Fault, commit: str | None = None) -> None:
        headers = {'X-Error-Code': fault.code, 'X-Error-Message': fault.message, 'X-Repo-Commit': commit}
        self._answer(fault.status, {'Content-Length': 0, **headers})

    def _send(self, commit: str, data: bytes, fault: Fault) -> None:
        body = b'\xff' * len(data) if fault.garbage else data
        if fault.flipped:
            body = body[:-1] + bytes([body[-1] ^ 1])
        wanted = _RANGE.fullmatch(self.headers.get('Range', ''))
        start = int(wanted[1]) if wanted else 0
        rest = body[start:]
        part = rest if fault.cut is None else rest[: int(fault.cut * len(rest))]
        announced = part if fault.announce_cut and self.command == 'GET' else rest
        headers = {
            'X-Repo-Commit': commit,
            'ETag': f'"{hashlib.sha256(data).hexdigest()}"',
            'Content-Length': len(announced),
            'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}' if wanted else None,
        }
        self._answer(206 if wanted else 200, headers)
        if self.command == 'GET':
            half = len(part) // 2
            self.wfile.write(part[:half])
            if fault.pause:
                self.wfile.flush()
                time.sleep(fault.pause)
            self.wfile.write(part[half:])

    def _answer(self, status: int, headers: Mapping[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass
