"""The trace viewer and reports, built from the files of runs."""
