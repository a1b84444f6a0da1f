"""What can be wrong with the bytes of a checkpoint."""


class DamagedError(ValueError):
    """Bytes are not those that were saved."""


class ForbiddenError(ValueError):
    """A pickle asks for something that no checkpoint needs."""
