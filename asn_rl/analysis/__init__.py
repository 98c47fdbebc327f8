"""Looking at what was learned: transfer curves, differences to a static rule, the report page."""
