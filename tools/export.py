#!/usr/bin/env python3
"""`rcmae export`, as a script."""

from rcmae.commands.export import main

raise SystemExit(main())
