"""The explorer: a web page on this machine that shows what happens inside a model."""

from dataclasses import dataclass, field


@dataclass
class ExploreConfig:
    """Look inside a model on a web page."""

    runs: str = "runs"
    """Folder of runs, whose models are offered."""
    examples: list[str] = field(default_factory=lambda: ["examples/images", "runs/garments/images/val"])
    """Folders of pictures to begin with; those that do not exist are left out."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 lets in all who reach it."""
    port: int | None = None
    """Port to listen on; null for the first free one from 7860 on."""
