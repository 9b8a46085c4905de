#!/usr/bin/env python3
"""`rcmae visualize`, as a script."""

from rcmae.commands.evaluation.visualize import main

raise SystemExit(main())
