#!/usr/bin/env python3
"""`rcmae shards index`: an index for WebDataset tars where they lie."""

from rcmae.commands.shards import index as main

if __name__ == "__main__":
    raise SystemExit(main())
