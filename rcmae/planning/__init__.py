"""What a run will need, computed before it starts; and what it needs of a node, looked at there.

`planner.plan` puts a site, estimates and memory together; `cluster.examine` is the doctor.
"""
