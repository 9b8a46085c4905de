#!/usr/bin/env python3
"""`rcmae report`, as a script."""

from rcmae.commands.report import main

raise SystemExit(main())
