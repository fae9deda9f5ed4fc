"""Which process groups the tests run on."""

from tests.distributed.conftest import backend, table_backend  # noqa: F401
