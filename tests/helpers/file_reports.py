"""A line for every test file in place of pytest's dots, with xdist too: what passed, what did not, and how long."""

from collections import Counter, defaultdict

import pytest

ORDER = ('failed', 'error', 'passed', 'skipped', 'xfailed', 'xpassed')


class FileReports:
    """Counts the reports of each file's tests, and writes the line after the last of them."""

    def __init__(self, config):
        self.config = config
        self.sizes = Counter()
        self.finished = Counter()
        self.outcomes = defaultdict(Counter)
        self.seconds = Counter()

    def _expect(self, ids):
        self.sizes = Counter(node_id.partition('::')[0] for node_id in ids)

    def pytest_collection_finish(self, session):
        if session.items:  # none in xdist's controller, to which the workers tell theirs
            self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._expect(ids)

    # Letters are what the terminal writes for each test: none.
    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report):
        status = yield
        return status if not status else (status[0], '', status[2])

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition('::')[0]
        self.seconds[file] += report.duration
        status = self.config.hook.pytest_report_teststatus(report=report, config=self.config)
        if status and status[0]:
            self.outcomes[file][status[0]] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid):
        file = nodeid.partition('::')[0]
        self.finished[file] += 1
        if self.finished[file] == self.sizes[file]:
            self._write(file)

    def _write(self, file):
        terminal = self.config.pluginmanager.get_plugin('terminalreporter')
        outcomes = self.outcomes[file]
        said = ', '.join(f'{outcomes[name]} {name}' for name in ORDER if outcomes[name])
        bad = outcomes['failed'] or outcomes['error']
        width = max(map(len, self.sizes))
        total = f'[{sum(self.finished.values()):{len(str(self.sizes.total()))}}/{self.sizes.total()}]'
        terminal.write_line(
            f'{total} {file:{width}}  {self.seconds[file]:6.1f} s  {said}', red=bool(bad), green=not bad
        )


def pytest_configure(config):
    # With -v pytest writes a line for every test itself; xdist's workers write nothing.
    if config.get_verbosity() <= 0 and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(FileReports(config), 'file-reports')
