"""Programs to run and to copy from, a folder each."""
