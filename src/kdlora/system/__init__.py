"""What every room needs of the machine: processes of its own, files that are whole or absent, locks, versions."""
