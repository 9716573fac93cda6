"""The one error class for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in a file, field or flag, told in one line: what was found, what was expected, what to do."""
