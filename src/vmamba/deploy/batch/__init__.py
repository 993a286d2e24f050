"""Many images, many machines: what ``vmamba batch`` does. Each module is imported when it is used."""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.deploy.batch.config import BatchConfig
    from vmamba.deploy.batch.run import Summary, run_batch

__all__ = ["BatchConfig", "Summary", "run_batch"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {"vmamba.deploy.batch.config": ["BatchConfig"], "vmamba.deploy.batch.run": ["Summary", "run_batch"]},
    )
