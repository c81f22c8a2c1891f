"""Where the domains' items come from, and how they become arrays."""
