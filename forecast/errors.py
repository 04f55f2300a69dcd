"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in the configuration or the data.

    Its message is one sentence that says what was received, what is allowed and what to do. The commands print
    that sentence without a traceback and exit with a code other than 0.
    """
