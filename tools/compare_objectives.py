#!/usr/bin/env python3
"""`rcmae compare`, as a script."""

from rcmae.commands.evaluation.compare import main

raise SystemExit(main())
