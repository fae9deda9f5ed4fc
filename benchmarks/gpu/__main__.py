from __future__ import annotations

import sys

from benchmarks.gpu.report import main

sys.exit(main())
