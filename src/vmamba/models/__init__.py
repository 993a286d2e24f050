"""The models: networks, their variants, and the reading of weights. Importing this registers every model."""

from vmamba.models import dense, registry  # noqa: F401
