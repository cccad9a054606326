"""The runner of the documentation's commands finds the faults that it should."""

import textwrap

import pytest

from tests.docs.snippets import Document, SnippetError, blocks_of, commands_of, unlike


@pytest.fixture
def document(tmp_path):
    def make(markdown: str) -> Document:
        path = tmp_path / "page.md"
        path.write_text(textwrap.dedent(markdown))
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        return Document(path, folder)

    return make


GOOD = """
    Text.

    ```console
    $ dualpipe show zb1p -P 2 -M 4
    schedule zb1p
    lane > 0 1
    rank 0: 0F0> ...
    rank 1: ...
    $ dualpipe show -P 2 > mine.txt
    $ cat mine.txt | head -n 1
    schedule dualpipe
    ```

    ```python
    number = 6
    ```

    ```python
    assert number * 7 == 42
    ```
    """


def test_a_correct_page_runs(document):
    page = document(GOOD)
    assert page.run(long=False) == 3
    assert (page.folder / "mine.txt").read_text().startswith("schedule dualpipe\n")


@pytest.mark.parametrize(
    ("planted", "instead", "message"),
    [
        ("lane > 0 1\n", "lane > 1 0\n", "`dualpipe show zb1p -P 2 -M 4` is shown with"),
        ("rank 1: ...", "rank 1:", "is shown with"),
        ("schedule dualpipe", "schedule zb1p", "`cat mine.txt | head -n 1` is shown with"),
        ("show zb1p -P 2", "show zb1p -P 0", "ended with 2, not 0"),
        ("cat mine.txt", "cat missing.txt", "is shown with"),
        ("number * 7", "number * 8", "AssertionError"),
        ("number = 6", "number = seven", "NameError"),
        ("```python\n    number = 6", "```\n    number = 6", "a block in no language"),
        ("```python\n    number = 6", "```rust\n    number = 6", "a block in rust"),
        ("```console", "```text", "looks like a command"),
    ],
)
def test_a_planted_fault_is_caught(document, planted, instead, message):
    assert planted in GOOD
    with pytest.raises(SnippetError, match=r"page\.md:\d+: ") as caught:
        document(GOOD.replace(planted, instead, 1)).run(long=False)
    assert message in str(caught.value)


def test_an_error_in_python_names_the_documents_line(document):
    with pytest.raises(SnippetError) as caught:
        document("one\n\n```python\nx = 1\nraise KeyError(x)\n```\n").run(long=False)
    assert 'page.md", line 5' in str(caught.value)


@pytest.mark.parametrize("line", ["dualpipe show -P 2", "python -m pytest", "from dualpipe import UP"])
def test_an_indented_command_or_import_is_caught(document, line):
    with pytest.raises(SnippetError, match="looks like a command"):
        document(f"Do:\n\n    {line}\n").run(long=False)


def test_comments_before_a_block(document):
    page = document(
        """
        <!-- file: mine.py -->
        ```python
        import dualpipe
        def build(): return dualpipe.zb1p(2, 4)
        ```

        ```bash
        dualpipe prove mine:build   # by its name
        ```

        <!-- exit code: 2 -->
        ```bash
        dualpipe show mine:nothing
        ```

        <!-- long: takes an hour -->
        ```bash
        false
        ```

        <!-- not run: needs a GPU -->
        ```bash
        torchrun train.py
        ```

        ```bash
        make verify
        ```
        """
    )
    assert page.run(long=False) == 3
    assert page.long
    assert [reason for _, reason in page.not_run()] == ["needs a GPU", "`make verify`: CI runs the targets"]
    with pytest.raises(SnippetError, match="`false` ended with 1"):
        page.run(long=True)


def test_another_exit_code_than_the_stated_one_is_caught(document):
    with pytest.raises(SnippetError, match="ended with 0, not 1"):
        document("<!-- exit code: 1 -->\n```bash\ndualpipe show -P 2\n```\n").run(long=False)


def test_a_target_that_make_does_not_know_is_caught(document):
    with pytest.raises(SnippetError, match="there is no target happiness"):
        document("```bash\nmake happiness\n```\n").run(long=False)


def test_a_comment_without_a_block_is_caught(document):
    with pytest.raises(SnippetError, match="no block after it"):
        document("<!-- not run: because -->\n\nWords.\n\n```bash\nfalse\n```\n")


def test_a_file_outside_of_the_folder_is_refused(document):
    with pytest.raises(SnippetError, match="is not in the document's folder"):
        document("<!-- file: ../mine.py -->\n```python\n```\n").run(long=False)


def test_output_before_a_command_is_refused():
    (block,) = blocks_of("```console\nhello\n$ true\n```\n", "page.md")
    with pytest.raises(SnippetError, match="output before the first command"):
        commands_of(block)


@pytest.mark.parametrize(
    ("shown", "printed", "differs"),
    [
        ("a b", "a   b\n", False),
        ("a ... d", "a b\nc d", False),
        ("a\n...\n", "a\n", False),
        ("... d", "a d e", True),
        ("a", "a b", True),
        ("a b", "ab", True),
        ("took ... s", "took 1.5 s", False),
        ("(1.*)", "(1.*)", False),
        ("(1.*)", "(1.5)", True),
    ],
)
def test_outputs_are_compared_by_words_with_dots_for_anything(shown, printed, differs):
    assert unlike(shown, printed) == differs


SHOWN = "<!-- output of: dualpipe show -P 2 -->\n```text\nschedule dualpipe\nlane > 0 1\n...\n```\n"


def test_a_text_block_with_a_command_is_compared_with_what_it_prints(document):
    assert document(SHOWN).run(long=False) == 1
    with pytest.raises(SnippetError, match=r"page\.md:2: `dualpipe show -P 2` is shown with"):
        document(SHOWN.replace("0 1", "1 0")).run(long=False)


def test_the_command_of_a_text_block_may_be_long_or_end_with_another_code(document):
    assert document(f"<!-- long: takes an hour -->\n{SHOWN.replace('-P 2', '-P 3')}").run(long=False) == 0
    refused = "<!-- exit code: 2 -->\n<!-- output of: dualpipe show -P 3 -->\n```text\ndualpipe: ...\n```\n"
    assert document(refused).run(long=False) == 1


def test_a_held_block_names_a_test_that_names_the_page(document):
    held = "<!-- held by: tests/docs/{} -->\n```text\nabout page.md\n```\n"
    assert document(held.format("test_snippets.py")).run(long=False) == 0
    for name in ("test_missing.py", "links.py"):
        with pytest.raises(SnippetError, match=r"is no test that names page\.md"):
            document(held.format(name)).run(long=False)


def test_a_document_finds_the_golden_files_of_a_clone(document):
    document("```bash\ndualpipe prove tests/golden/torch-zbv-4x8.csv --model blocking\n```\n").run(long=False)
