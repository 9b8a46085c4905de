"""Checks of this package against folders of recorded numbers, a file each family of methods."""
