"""The package's error for input that cannot be used."""


class InputError(ValueError):
    """A user's input cannot be used.

    The message is one line that names what cannot be used, the numbers and the remedy; the command line prints it as it
    stands and exits with 2.
    """
