"""What tests that start processes of their own agree on."""

CHILD_SECONDS = 900  # only a process that hangs takes longer: a loaded machine may run one ten times slower
