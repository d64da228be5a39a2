"""The one error that the command line turns into a line of its own."""


class IpvrmError(ValueError):
    """Something the user can act on. The command line prints its message on its own and exits with 2."""


class FailedAlike(IpvrmError):
    """A failure that every rank of a run meets at the same place, so that all can still act together."""
