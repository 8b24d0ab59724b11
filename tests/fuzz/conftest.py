from helpers.fuzzing import TALLY, THOROUGH


def pytest_terminal_summary(terminalreporter):
    if THOROUGH:
        terminalreporter.section(f'{sum(TALLY.values())} settings drawn')
        for what, count in sorted(TALLY.items()):
            terminalreporter.write_line(f'{count:6d} {what}')
