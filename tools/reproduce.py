#!/usr/bin/env python3
"""`rcmae reproduce`, as a script."""

from rcmae.commands.again.reproduce import main

raise SystemExit(main())
