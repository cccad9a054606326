"""The lines of the program that an error names."""

from dualpipe.record.child.errors import describe


def test_an_error_outside_of_modules_names_the_lines_that_called_the_package_in_which_it_was_raised():
    names = {"__name__": "other"}
    for file, source in (
        ("/env/site-packages/a.py", "def inner(): raise ValueError\ndef outer(): inner()"),
        ("/home/schedules.py", "def backward(): outer()"),
        ("/home/train.py", "def train(): backward()"),
    ):
        exec(compile(source, file, "exec"), names)
    try:
        names["train"]()
    except ValueError as error:
        place = describe(error)["place"]
    assert place.startswith("/env/site-packages/a.py:1 (called at /home/schedules.py:1, /home/train.py:1, ")
