"""What tests that start processes of their own agree on."""

CHILD_SECONDS = 1800  # only a process that hangs takes longer: on a loaded machine one may take ten times as long
