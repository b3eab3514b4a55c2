"""What maintainers run by hand or by make. In no wheel."""
