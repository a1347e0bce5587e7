"""The steps from a source to an outcome, one file each: each takes frozen values and gives a new one."""
