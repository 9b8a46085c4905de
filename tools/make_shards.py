#!/usr/bin/env python3
"""`rcmae shards make`: WebDataset shards, with their index, from images."""

from rcmae.commands.shards import make as main

if __name__ == "__main__":
    raise SystemExit(main())
