#!/usr/bin/env python3
"""`rcmae doctor`, from a checkout."""

from rcmae.commands.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
