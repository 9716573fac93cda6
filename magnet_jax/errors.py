"""Mistakes that a user can mend, told in one line."""


class UserError(Exception):
    """A mistake in a file, field or flag, told in one line: what was found, what was expected, what to do."""


def config_error(error: Exception) -> str:
    """One line for what absl and ml_collections raise about flags and the configuration."""
    if isinstance(error, OSError):
        return f"--config: {str(error).strip().splitlines()[-1].strip()}"
    while error.args and isinstance(error.args[0], Exception):  # The libraries wrap one in another,
        error = error.args[0]
    if "Traceback (most recent call last)" in str(error):  # Of a file that refuses what is asked of it.
        return f"--config: {str(error).strip().splitlines()[-1].strip()}"
    # and a KeyError shows its message quoted, with the line breaks spelled out.
    line = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, KeyError) and " " not in line:
        return f"the configuration has no field {line}; configs/common.py lists them all"
    return line
