#!/usr/bin/env python3
"""`rcmae probes`, as a script."""

from rcmae.commands.evaluation.probes import main

raise SystemExit(main())
