"""The one error that is the user's: everything else that is raised is ours, or the machine's."""


class Refused(ValueError):
    """Something that a user gave cannot be used: says what, what was got, and the way out.

    Entry points print it and exit with 2. A plain ValueError is a bug of this package: it ends with
    a traceback and exit status 1.
    """
