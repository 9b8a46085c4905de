#!/usr/bin/env python3
"""`rcmae checkpoint`: look at checkpoints, check them, compare two, delete old ones."""

from rcmae.commands.checkpoint import main

raise SystemExit(main())
