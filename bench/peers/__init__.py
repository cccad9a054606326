"""What the scripts of bench/ share: executors of pipeline schedules, and the check of their results."""
