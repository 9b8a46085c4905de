#!/usr/bin/env python3
"""`rcmae robustness`, as a script."""

from rcmae.commands.evaluation.robustness import main

raise SystemExit(main())
