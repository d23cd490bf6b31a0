"""Every route by which a model under training leaves its process or its optimizer: `docs/routes.md` is their table."""
