"""Trainings judged side by side: objectives of one recipe, or runs that are there.

`runs` trains what is missing and groups what differs in its seeds alone, `judging` gives the
figures, `tables` and `curves` show them as mean and standard deviation over seeds."""
