"""`python -m recap_fast`."""

from recap_fast.diagnostics.main import main

raise SystemExit(main())
