"""The one error that the command line turns into a line of its own."""


class IpvrmError(ValueError):
    """Something the user can act on. The command line prints its message on its own and exits with 2."""
