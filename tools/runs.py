#!/usr/bin/env python3
"""`rcmae runs`: where a run stands, where its time went, and how long it still takes."""

from rcmae.commands.runs import main

raise SystemExit(main())
