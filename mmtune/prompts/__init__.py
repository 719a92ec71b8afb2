"""Records to Examples: templates and the instruction schema."""
