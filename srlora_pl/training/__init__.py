"""Any LightningModule that adapts a network: hooks, exact resume, checkpoint files, interrupts."""
