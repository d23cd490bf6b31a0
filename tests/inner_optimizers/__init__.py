"""Every inner optimizer with both rules: `docs/inner-optimizers.md` is the table of what follows, resumes and loads."""
