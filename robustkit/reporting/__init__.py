"""What people see: progress, tables, figures. Nothing here decides anything; importing this package costs nothing."""
