#!/usr/bin/env python3
"""`rcmae convert`, as a script."""

from rcmae.commands.convert import main

raise SystemExit(main())
