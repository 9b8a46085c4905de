#!/usr/bin/env python3
"""`rcmae shards check`: what is in shards, what is wrong with them, and a clean copy of them."""

from rcmae.commands.shards import check as main

if __name__ == "__main__":
    raise SystemExit(main())
