#!/usr/bin/env python3
"""`rcmae plan`, from a checkout."""

from rcmae.commands.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
