"""Reading what may be anything."""

from dualpipe.schedule import Schedule
from dualpipe.schedule.text import ScheduleSyntaxError


def outcome(read, *given):
    """The schedule that was read, or the error with its place; whatever else is raised is the reader's bug."""
    try:
        return read(*given)
    except ScheduleSyntaxError as error:
        return error


def is_schedule_or_points_into(text, result):
    """Whether the outcome is a schedule, or an error whose line and column are in the text or right behind it."""
    if isinstance(result, Schedule):
        return True
    lines = text.split("\n")
    return 1 <= result.line <= len(lines) and 1 <= result.column <= len(lines[result.line - 1]) + 1
