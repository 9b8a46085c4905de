"""The commands of `rcmae`, a file a command or a family: arguments and printing, no logic that
another program could want.

A file imports only the standard library at its top and what is heavy after the arguments are
parsed, so that help and a mistyped option answer at once.
"""
