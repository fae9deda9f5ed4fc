"""`python -m recap_fast`."""

from recap_fast.cli import main

raise SystemExit(main())
