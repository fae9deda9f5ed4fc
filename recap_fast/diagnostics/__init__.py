"""`python -m recap_fast`, or `recap-fast`: what this build is."""
