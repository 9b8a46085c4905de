#!/usr/bin/env python3
"""`rcmae replay`: run a step that went bad again, on one process."""

from rcmae.commands.again.replay import main

raise SystemExit(main())
