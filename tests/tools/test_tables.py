"""_tables: tables in Markdown, and pages that hold them."""

from _tables import insert_table, markdown_table


def test_markdown_table():
    assert markdown_table([['a', 'b'], ['---', '---:'], ['1', '']]) == '| a | b |\n| --- | ---: |\n| 1 |  |'


def test_insert_table():
    before = '# Title\n\n<begin>\nold\n<end>\nAfter.\n'
    after = insert_table(before, '| new |', '<begin>', '<end>')
    assert after == '# Title\n\n<begin>\n| new |\n<end>\nAfter.\n'
    assert insert_table(after, '| new |', '<begin>', '<end>') == after
