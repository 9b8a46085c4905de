"""`python -m rcmae COMMAND ...`, as `rcmae COMMAND ...`."""

from rcmae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
