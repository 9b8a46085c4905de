#!/usr/bin/env python3
"""`rcmae slurm-job`: what the templates of SLURM jobs ask."""

from rcmae.commands.slurm_job import main

raise SystemExit(main())
