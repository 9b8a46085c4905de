#!/usr/bin/env python3
"""`rcmae analyze-teacher`, as a script."""

from rcmae.commands.evaluation.analyze_teacher import main

raise SystemExit(main())
