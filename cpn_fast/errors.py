"""The one exception for what a user can put right: the command line prints it without a traceback."""


class UserError(Exception):
    """Bad input: the message names the file or key, what was found, what was expected and what to do."""
