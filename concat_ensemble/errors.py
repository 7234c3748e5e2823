"""How foreign errors are told to a user."""


def first_line(error: Exception) -> str:
    """What an error says, in one line: its first, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
